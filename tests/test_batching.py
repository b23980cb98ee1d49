"""Forward passes with batches that are halved when out of memory, and compiled ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit import BackboneError, DenoiseOptions
from denoising_vit.backbones.passes import Passes, compiled
from denoising_vit.decomposition.stage_one import Ready, StageOne
from planted import backbone as planted
from planted import photos

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """One convolution, with memory for at most ``room`` images at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.room = nn.Conv2d(3, 5, 8, 8), 99
        self.tried: list[int] = []
        self.real_room = room

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.patches(images)


def with_room(room: int) -> tuple[Small, dv.Backbone]:
    module = Small(room)
    backbone = dv.load_backbone(module, patch_size=8, default_size=16)
    module.room = module.real_room
    module.tried.clear()
    return module, backbone


def test_batch_that_does_not_fit_is_halved_and_stays_halved() -> None:
    module, backbone = with_room(3)
    images = torch.randn(8, 3, 16, 16)
    passes = Passes(backbone)
    found = passes(images)
    assert module.tried == [8, 4, 2, 2, 2, 2]
    module.tried.clear()
    torch.testing.assert_close(passes(images), found, rtol=0, atol=0)
    assert module.tried == [2, 2, 2, 2]
    assert passes.most == 2
    module.room = 99
    torch.testing.assert_close(found, backbone(images), rtol=1e-5, atol=1e-6)


def test_batch_that_fits_is_not_split() -> None:
    module, backbone = with_room(8)
    passes = Passes(backbone)
    passes(torch.randn(8, 3, 16, 16))
    assert module.tried == [8] and passes.most is None


def test_out_of_memory_for_one_image_is_reported_with_its_size() -> None:
    _, backbone = with_room(0)
    with pytest.raises(
        BackboneError, match=r"not enough memory for a single image of 16 x 24 pixels; use smaller views"
    ):
        Passes(backbone)(torch.randn(4, 3, 16, 24))


def test_other_errors_are_not_treated_as_out_of_memory() -> None:
    class Broken(Small):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().forward(images)

    backbone = dv.load_backbone(Broken(9), patch_size=8, default_size=16)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Passes(backbone)(torch.randn(4, 3, 16, 16))


def test_stage_1_continues_with_smaller_batches() -> None:
    module, backbone = with_room(3)
    photo = photos(1)[0]
    options = DenoiseOptions(views=9, held_out=2, size=56, batch_size=11)
    (ready,) = StageOne(backbone, options).run([(0, "a", photo)])
    assert isinstance(ready, Ready)
    assert max(module.tried) == 11 and module.tried[-1] <= 2
    halved = dv.denoise_image(backbone, photo, options=options)
    module.room = 99
    whole = dv.denoise_image(backbone, photo, options=options)
    for field in (ready.finish().field, halved.field):
        torch.testing.assert_close(field, whole.field, rtol=1e-4, atol=1e-5)


def test_a_compiled_backbone_gives_the_same_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    real = torch.compile

    def eager(*args: object, **options: object) -> object:
        asked.append(options)
        return real(*args, **{**options, "backend": "eager"})  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(torch, "compile", eager)
    options = DenoiseOptions(views=12, held_out=0, batch_size=5)
    fields = []
    for backbone in (planted(share=0.1), compiled(planted(share=0.1))):
        (ready,) = StageOne(backbone, options).run([(0, "a", photos(1)[0])])
        assert isinstance(ready, Ready)
        fields.append(ready.finish().field)
    assert asked == [{"dynamic": False}]
    torch.testing.assert_close(fields[1], fields[0], rtol=1e-5, atol=1e-5)


def test_compiled_backbone_gets_batches_of_one_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    module, backbone = with_room(99)
    _ = backbone.fingerprint
    module.tried.clear()
    plain, passes = backbone(torch.ones(2, 3, 16, 24)), Passes(compiled(backbone))
    module.tried.clear()
    assert len(passes(torch.ones(6, 3, 16, 24))) == 6
    torch.testing.assert_close(passes(torch.ones(2, 3, 16, 24)), plain)
    assert module.tried == [6, 6]
    module.room = 4
    assert len(passes(torch.ones(5, 3, 16, 24))) == 5
    assert module.tried == [6, 6, 6, 3, 3]
