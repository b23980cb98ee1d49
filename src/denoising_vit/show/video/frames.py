"""Features of frames, and the picture of one frame: rows of features, columns of panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from denoising_vit.artifact import artifact_digest, known_artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoise import Denoising
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.extractors import KINDS, Cleaners, Extractor
from denoising_vit.maps import Palette
from denoising_vit.maps.kinds import MAP_KINDS
from denoising_vit.show.options import PANELS, VideoOptions
from denoising_vit.views.rendering import per_channel


class FrameFeatures:
    """Extractor of the features of frames, by name; DenoisingVitError as in :meth:`Cleaners.extractor`.

    ``identity`` identifies backbone and cleaners, as JSON values.
    """

    def __init__(self, backbone: Backbone, cleaners: Cleaners, options: VideoOptions) -> None:
        self.backbone, self._names = backbone, options.names
        self._denoising = options.as_denoising()
        self._artifact = cleaners.artifact
        self._made: Denoising | None = None  # for the size of the last frame
        self.identity: dict[str, Any] = {"backbone": describe(backbone)}
        self._extractors: dict[str, Extractor] = {}
        for name in self._names:
            if not KINDS[name].per_image:
                self._extractors[name], found = cleaners.extractor(name, backbone)
                self.identity |= found
            elif cleaners.artifact is not None:
                known = known_artifact(cleaners.artifact, backbone, backbone.grid_size(*[backbone.default_size] * 2))
                self.identity["artifact of exact"] = artifact_digest(known)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> dict[str, Tensor]:
        """Features (B, h, w, C) float32 on the CPU of frames (B, H, W, 3) uint8, by name, in order."""
        return {name: features.float().cpu() for name, features in self._of(frames).items()}

    def _of(self, frames: np.ndarray) -> dict[str, Tensor]:
        images = self._normalised(frames)
        raw = None
        found: dict[str, Tensor] = {}
        for name in self._names:
            extractor = self._extractors.get(name)
            if extractor is None:
                found[name] = torch.stack([self._exact(frame) for frame in frames])
            elif extractor is self.backbone:
                found[name] = raw = self.backbone(images) if raw is None else raw
            elif isinstance(extractor, DenoisedViT) and extractor.backbone is self.backbone:
                raw = self.backbone(images) if raw is None else raw
                found[name] = extractor.clean(raw)
            else:
                found[name] = extractor(images)
        return found

    def _normalised(self, frames: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) on the backbone's device."""
        images = torch.from_numpy(frames).to(self.backbone.device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (per_channel(values, images.device) for values in (self.backbone.mean, self.backbone.std))
        return images.sub_(mean).div_(std)

    def _exact(self, frame: np.ndarray) -> Tensor:
        size = (frame.shape[0], frame.shape[1])
        if self._made is None or self._made.options.size != size:
            own = Cleaners(artifact=self._artifact)
            self._made = Denoising(self.backbone, replace(self._denoising, size=size), own)
        return self._made(frame).semantic


#: Margin between and around panels in pixels, and height of a heading.
GAP, HEADING = 8, 26

#: Font size of headings, and the minimum for narrow panels.
LETTERS, LEAST_LETTERS = 18, 9

_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def panel_fields(panels: Sequence[str]) -> set[str]:
    """Attributes of a clip's palette that these panels use."""
    return {field for panel in panels if panel in MAP_KINDS for field in MAP_KINDS[panel].fields}


def panel_picture(panel: str, features: Tensor, clip: Palette, data_set: Palette | None) -> np.ndarray:
    """Features (h, w, C) as (h, w, 3) uint8, in the colours of the clip or, for some panels, of the data set."""
    if panel == "dataset-pca":
        assert data_set is not None  # checked by the options
        return data_set.colours("pca", features)
    return (data_set if data_set and panel == "foreground" else clip).colours(panel, features)


class FrameSheet:
    """A layout shared by all frames: one row per kind of features, one column per panel of (H, W) pixels.

    The image appears once, vertically centred. ``size`` is (H, W) in pixels of the whole sheet, both even.
    """

    def __init__(self, features: Sequence[str], panels: Sequence[str], panel: tuple[int, int], *, smooth: bool) -> None:
        self._panel, self._smooth = panel, smooth
        rows = 1 if tuple(panels) == ("image",) else len(features)
        cell = panel[0] + HEADING + GAP
        height, width = GAP + rows * cell, GAP + len(panels) * (panel[1] + GAP)
        self.size = height + height % 2, width + width % 2
        self._places: dict[tuple[str | None, str], tuple[int, int]] = {}
        headings = Image.new("RGB", (self.size[1], self.size[0]), _PAPER)
        draw = ImageDraw.Draw(headings)
        for column, kind in enumerate(panels):
            left = GAP + column * (panel[1] + GAP)
            for row, name in enumerate((None,) if kind == "image" else features):
                top = GAP + row * cell if name is not None else GAP + (rows - 1) * cell // 2
                self._places[name, kind] = top + HEADING, left
                heading = PANELS[kind] if name is None else f"{name}: {PANELS[kind]}"
                draw.text((left, top + HEADING // 2), heading, _INK, _font(heading, panel[1]), anchor="lm")
        self._pixels = np.array(headings)

    def draw(self, image: np.ndarray, maps: Mapping[tuple[str | None, str], np.ndarray]) -> np.ndarray:
        """The sheet (H, W, 3) uint8 of a frame, in an array that is reused for every frame.

        Args:
            image: the frame at the size of a panel, (H, W, 3) uint8.
            maps: pictures (h, w, 3) uint8 by features and panel.
        """
        for place, (top, left) in self._places.items():
            pixels = image if place[0] is None else self._enlarged(maps[place])
            self._pixels[top : top + self._panel[0], left : left + self._panel[1]] = pixels
        return self._pixels

    def _enlarged(self, picture: np.ndarray) -> np.ndarray:
        """A picture (h, w, 3) at the size of a panel."""
        height, width = self._panel
        method = Image.Resampling.BICUBIC if self._smooth else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(picture).resize((width, height), method))


def _font(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font in which the text fits a width in pixels."""
    for size in range(LETTERS, LEAST_LETTERS, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(LEAST_LETTERS)
