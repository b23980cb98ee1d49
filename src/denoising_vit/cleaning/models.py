"""Mixins that edit what models return: timm, transformers, any module, and Backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from denoising_vit.backbones import Backbone, Intermediates
from denoising_vit.backbones.module import Layout, as_output, as_tokens, layout_of, tensor_in, with_tensor
from denoising_vit.backbones.subclassing import Specialised, generalise
from denoising_vit.backbones.timm_vit import edit_intermediates
from denoising_vit.cleaning.tokens import Cleaning


class Cleaned(Specialised):
    """Mixin of every cleaned module."""

    _cleaning: Cleaning

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        moved_module = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        self._cleaning.moved_by(fn)
        return moved_module

    def extra_repr(self) -> str:
        """One more line for ``repr``."""
        before = super().extra_repr()  # pyright: ignore[reportAttributeAccessIssue]
        return "\n".join(filter(None, (before, self._cleaning.words)))


class CleanTimm(Cleaned):
    """A timm ViT with clean patch tokens after its last block."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (B, P + h w, C), with clean patch tokens."""
        run = super().forward_features  # pyright: ignore[reportAttributeAccessIssue]
        return self._all_tokens(run(x, *args, **kwargs), x, lambda image: run(image, *args, **kwargs))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Timm's intermediates, with those of the last block clean."""
        run = super().forward_intermediates  # pyright: ignore[reportAttributeAccessIssue]
        features = super().forward_features  # pyright: ignore[reportAttributeAccessIssue]
        found = run(x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, *args, **kwargs)
        cleaning, blocks = self._cleaning, len(self.blocks)  # pyright: ignore[reportAttributeAccessIssue]
        taken, most = feature_take_indices(blocks, indices)
        if blocks != cleaning.depth or (stop_early and most < blocks - 1):
            return found  # it stopped before the last block
        last = sorted(taken).index(blocks - 1) if blocks - 1 in taken else None

        def again(image: Tensor) -> Tensor:
            return run(image, [blocks - 1], False, norm, False, "NLC", True)[0]

        def patches(tokens: Tensor, number: int) -> Tensor:
            if number != last:
                return tokens
            square = output_fmt == "NCHW"
            tokens = tokens.flatten(2).transpose(1, 2) if square else tokens  # (B, C, h, w) -> (B, h w, C)
            clean = cleaning.tokens(tokens, x, again, normed=norm and self._normed())
            return clean.unflatten(1, cleaning.grid(x)).permute(0, 3, 1, 2).contiguous() if square else clean

        return edit_intermediates(found, patches, lambda tokens: self._all_tokens(tokens, x, features))

    def _all_tokens(self, tokens: Tensor, image: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Prefix and patch tokens (B, P + h w, C), with patch tokens cleaned unless the last blocks were pruned."""
        if len(self.blocks) != self._cleaning.depth:  # pyright: ignore[reportAttributeAccessIssue]
            return tokens
        return self._cleaning.all_tokens(tokens, image, again, normed=self._normed())

    def _normed(self) -> bool:
        """True if the model applies its norm before any pooling; a pruned model no longer does."""
        return not isinstance(self.norm, nn.Identity)  # pyright: ignore[reportAttributeAccessIssue]


class CleanTransformers(Cleaned):
    """A ViT of transformers with clean patch tokens in ``last_hidden_state`` and ``hidden_states[-1]``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with a clean last hidden state."""
        run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        image = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        found = run(*args, **kwargs)
        cleaning = self._cleaning

        def run_on(other: Tensor) -> Any:
            if "pixel_values" in kwargs:
                return run(*args, **kwargs | {"pixel_values": other})
            return run(other, *args[1:], **kwargs)

        def again(other: Tensor) -> Tensor:
            return tensor_in(run_on(other), "the model")

        last = tensor_in(found, "the model")
        clean = cleaning.all_tokens(last, image, again, normed=cleaning.normed)
        changed = with_tensor(found, clean)
        states, where = _hidden_states(found)
        if states is None:
            return changed

        def again_before_the_norm(other: Tensor) -> Tensor:
            more, _ = _hidden_states(run_on(other))
            assert more is not None  # as in the first pass
            return more[-1]

        end = (
            clean if states[-1] is last else cleaning.all_tokens(states[-1], image, again_before_the_norm, normed=False)
        )
        states = (*states[:-1], end)
        if isinstance(where, int):
            return (*changed[:where], states, *changed[where + 1 :])
        changed[where] = states
        return changed


def _hidden_states(output: Any) -> tuple[tuple[Tensor, ...] | None, int | str]:
    """The hidden states in the output of a model of transformers, and their index or name."""
    if isinstance(output, dict):
        return output.get("hidden_states"), "hidden_states"
    shape = output[0].shape
    for number, part in enumerate(output):
        if isinstance(part, tuple) and part and part[-1].shape == shape:
            return part, number
    return None, 0


class CleanModule(Cleaned):
    """Any module whose output is a grid or tokens."""

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output with clean features."""
        run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        cleaning, name = self._cleaning, type(self).__name__
        grid = cleaning.grid(image)

        def tokens_of(output: Any) -> tuple[Tensor, Layout]:
            found = tensor_in(output, name)
            layout = layout_of(found, *grid, name) if cleaning.layout == "auto" else cleaning.layout
            return as_tokens(found, layout, grid, name), layout

        output = run(image, *args, **kwargs)
        tokens, layout = tokens_of(output)
        clean = cleaning.all_tokens(tokens, image, lambda other: tokens_of(run(other, *args, **kwargs))[0], normed=True)
        return with_tensor(output, as_output(clean, layout, grid))


class CleanBackbone(Cleaned):
    """A :class:`Backbone` whose features are clean."""

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Clean features (B, h, w, C), and the unchanged prefix tokens."""
        features, prefix = super().forward_with_prefix(image)  # pyright: ignore[reportAttributeAccessIssue]
        return self._clean(features, image), prefix

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        """Clean features, and raw features of other layers."""
        found = super().forward_intermediates(image, layers)  # pyright: ignore[reportAttributeAccessIssue]
        return found._replace(features=self._clean(found.features, image))

    def at_layer(self, layer: int) -> Backbone:
        """Another layer, with raw features, because the cleaner belongs to this layer."""
        other = super().at_layer(layer)  # pyright: ignore[reportAttributeAccessIssue]
        generalise(other)
        return other

    def _clean(self, features: Tensor, image: Tensor) -> Tensor:
        run = super().forward_with_prefix  # pyright: ignore[reportAttributeAccessIssue]
        return self._cleaning.features(features, image, lambda other: run(other)[0])
