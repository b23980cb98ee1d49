"""Neutral crops: random squares, every other one upside down, so that place in the view says little about content.

In whole photos skies are above and roads below, so that any features tell the place, clean ones as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.rendering import ViewRenderer
from denoising_vit.sampling import at_patches
from denoising_vit.views import ViewPlan

#: Least and largest side of a neutral crop, relative to the photo's.
_SIDES = 0.4, 0.8


@dataclass(frozen=True)
class NeutralCrop:
    """One crop of one photo.

    Attributes:
        view: a plan with this one view.
        inverted: whether it is shown turned by 180 degrees.
    """

    view: ViewPlan
    inverted: bool

    @classmethod
    def draw(cls, number: int, plan: ViewPlan, seed: int) -> NeutralCrop:
        """The crop of photo ``number``, in views as those of ``plan``; the same numbers give the same crop."""
        stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, number])))
        side, left, top = stream.random_sample(3)
        side = _SIDES[0] + side * (_SIDES[1] - _SIDES[0])
        left, top = left * (1 - side), top * (1 - side)
        boxes, flips = np.array([[left, top, left + side, top + side]]), np.zeros(1, dtype=bool)
        view = ViewPlan(boxes, flips, plan.size, plan.patch_size, plan.stride, plan.resolution)
        return cls(view, number % 4 >= 2)  # not every other one: halves of the photos have both

    def render(self, image: Tensor, backbone: Backbone) -> Tensor:
        """The crop of an image (3, H, W) in [0, 1], normalised: (1, 3, H, W)."""
        shown = ViewRenderer(image, self.view, backbone.mean, backbone.std)(slice(1))
        return shown.flip((2, 3)) if self.inverted else shown

    def sample(self, nodes: Tensor) -> Tensor:
        """A field of the photo (Ry, Rx, C) at the crop's patches, as they are shown: (h, w, C)."""
        sampled = at_patches(nodes, self.view)
        return sampled.flip((0, 1)) if self.inverted else sampled
