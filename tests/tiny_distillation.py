"""Shared by the tests of distillation: a ViT of two blocks, its denoisers, and runs that take a second."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny_artifact
import tiny_fit
from denoising_vit import Backbone, Denoiser
from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model
from denoising_vit.data import Dataset, open_dataset
from denoising_vit.denoiser import held_out as denoiser_held_out
from denoising_vit.denoiser import write_denoiser
from denoising_vit.denoiser.job import Stored
from denoising_vit.distilled import held_out as distilled_held_out
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.options import ViewOptions
from tiny_training import rows

MODEL, CHANNELS = tiny_fit.MODEL, 192

#: A grid of 3 x 3 patches.
SIZE, GRID = 48, (3, 3)

#: Number of photos in the shared folder.
PHOTOS = 11

#: Pattern of a server's files that are photos.
PICTURES = (".png",)


def backbone(depth: int = 2, layer: int = -1, *, seed: int = 0, norm: bool = True) -> TimmBackbone:
    """The tiny ViT with fewer blocks; another seed gives other weights."""
    model = build_timm_model(MODEL, pretrained=False, depth=depth)
    chance = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.add_(torch.randn(value.shape, generator=chance) * 0.01)
    return TimmBackbone(model, name=MODEL, stride=None, layer=layer, norm=norm, weights=f"seed {seed}")


def denoiser(trained_for: Backbone | None, seed: int = 0, strength: float = 0.1, channels: int = CHANNELS) -> Denoiser:
    """A frozen denoiser with a large effect, whose values are exact in float16.

    Args:
        trained_for: its backbone, if it records one.
        seed: seed of its values.
        strength: standard deviation of the values; if it is small, raw features are close to clean ones.
        channels: number of channels.
    """
    made = Denoiser(channels, GRID, trained_for=None if trained_for is None else describe(trained_for))
    chance = torch.Generator().manual_seed(seed)
    for name, value in made.requires_grad_(False).named_parameters():
        value.copy_((torch.randn(value.shape, generator=chance) * strength + float("norm" in name)).half())
    return made.eval()


def write(made: Denoiser, path: Path) -> Path:
    write_denoiser(made, path)
    return path


class Tokens(nn.Module):
    """Patches, a class token and registers with separate parameters; and an unused head."""

    def __init__(self, prefix: int = 3, channels: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, channels, 16, 16)
        self.prefix = nn.Parameter(torch.randn(1, prefix, channels)) if prefix else None
        self.head = nn.Linear(channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.project(image).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)
        if self.prefix is None:
            return patches
        return torch.cat([self.prefix + patches.mean(1, keepdim=True), patches], dim=1)


def tokens(prefix: int = 3) -> Backbone:
    """A custom module as a backbone, with class token and registers."""
    return tiny_artifact.dv.load_backbone(Tokens(prefix), patch_size=16, default_size=SIZE)


def options(**changes: Any) -> DistillOptions:
    values: dict[str, Any] = {"steps": 6, "batch_size": 2, "learning_rate": 0.02, "held_out": 3, "blank": 0.0}
    values |= {"evaluate_every": 3, "checkpoint_every": 2, "precision": "float32"}
    return DistillOptions(**(values | changes))


def views(**changes: Any) -> ViewOptions:
    values: dict[str, Any] = {"sizes": str(SIZE)}
    return ViewOptions(**(values | changes))


def prepared(
    source: Path | Dataset | Stored,
    run: Path,
    model: Backbone | BackboneSpec | None = None,
    training: DistillOptions | None = None,
    shown: ViewOptions | None = None,
    **more: Any,
) -> DistillJob:
    """A job on photos, with a denoiser of the backbone if no teacher is given."""
    model = backbone() if model is None else model
    if isinstance(model, Backbone) and not isinstance(source, Stored) and "denoiser" not in more:
        more["denoiser"] = denoiser(model, channels=model.embed_dim)
    source = open_dataset(source) if isinstance(source, Path) else source
    return DistillJob.prepare(source, run, model, training or options(), shown or views(), **more)


def distilled(source: Path | Dataset | Stored, run: Path, *args: Any, **more: Any) -> tuple[DistillJob, Progress]:
    """A job that was run, to its end or to where it stops."""
    job = prepared(source, run, *args, **more)
    return job, job.training().run()


def results(run: Path) -> dict[str, Any]:
    """Exact results of a run, however often it was stopped: last checkpoint, models, names of panels, log."""
    files = [max((run / "checkpoints").iterdir()), run / "distilled.safetensors", run / "last.safetensors"]
    contents: dict[str, Any] = {path.name: path.read_bytes() for path in files if path.is_file()}
    return contents | {"log": rows(run), "panels": sorted(path.name for path in (run / "panels").iterdir())}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the current values."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is added to all keys alike changes no attention: their gradient is rounding alone, which Adam enlarges."""
    found = dict(weights)
    for name, value in weights.items():
        if name.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            found[name] = torch.cat([query, values])
    return found


def _blank(folder: Path, step: int, *_: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1)).save(folder / f"step-{step:07}.png")


@contextlib.contextmanager
def blank_panels() -> Iterator[None]:
    """Empty panels: drawing takes longer than training here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (denoiser_held_out, distilled_held_out):
            patch.setattr(module, "draw_panel", _blank)
        yield


# --- shards and servers ---


def write_shard(path: Path, photos: Path, first: int = 0, count: int | None = None) -> Path:
    """Photos of a folder as WebDataset stores them: each with its class next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = sorted(photos.iterdir())[first : None if count is None else first + count]
    with tarfile.open(path, "w") as archive:
        for photo in chosen:
            for name, content in ((photo.name, photo.read_bytes()), (f"{photo.stem}.cls", b"7")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, or ranges of them; answers with an error as many times as requested.

    Attributes:
        away: of the next requests for photos, how many get no answer but an error.
        failed: how many did.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.away = self.failed = 0
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def refuses(self, path: str) -> bool:
        self.asked.append(path)
        if self.away < 1 or not path.endswith(PICTURES):
            return False
        self.away, self.failed = self.away - 1, self.failed + 1
        return True


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        wanted, path = self.headers.get("Range", ""), Path(self.translate_path(self.path))
        if self.server.refuses(self.path):
            return self.send_error(503)
        if not (wanted and path.is_file()):
            return super().do_GET()
        content = path.read_bytes()
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
