"""Layout and theme of the page, and the handlers of its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default

from denoising_vit.backbones import SEEDS
from denoising_vit.extractors import KINDS, features_help
from denoising_vit.show.app.answers import LIFETIME, MOST_SCALE, MOST_VIEWS, Settings, largest_size
from denoising_vit.show.app.handlers import Handlers, about
from denoising_vit.show.app.models import Models
from denoising_vit.show.app.scene import LEGENDS, MAPS
from denoising_vit.views.patch_grid import nearest_sizes

#: Seconds between removals of old files.
_TIDYING = 300

_INTRODUCTION = """# Clean features of a Vision Transformer
Choose or upload a photo, press **Denoise**, and compare raw and denoised features. Both sides use the same colours,
so equal colours mean equal features. Photos stay on the computer that runs this page and are deleted automatically."""


class _Controls:
    """Components of the page, created within a gr.Blocks."""

    def __init__(self, models: Models, samples: dict[str, Path]) -> None:
        self.photo = gr.State(None, time_to_live=LIFETIME)
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._settings(models, samples)
            with gr.Column(scale=5, min_width=320):
                self._results()

    def _settings(self, models: Models, samples: dict[str, Path]) -> None:
        model = models.get(models.spec.backbone)
        own = model.backbone
        self.sample = gr.Dropdown(list(samples), value=next(iter(samples)), label="Sample photo", elem_id="sample")
        self.upload = gr.UploadButton("Upload a photo", file_types=["image"], elem_id="upload", size="md")
        self.about_photo = gr.Markdown(elem_id="about-photo")
        self.backbone = gr.Dropdown(
            [(_label(name, models), name) for name in models.names],
            value=models.spec.backbone,
            label="Backbone",
            elem_id="backbone",
        )
        self.about_backbone = gr.Markdown(about(model), elem_id="about-backbone")
        self.method = gr.Radio(
            list(model.methods),
            value=model.methods[0],
            label="Method",
            info=f"{features_help(KINDS[name] for name in model.methods)}.",
            elem_id="method",
        )
        self.layer = gr.Number(models.spec.layer, label="Layer", precision=0, elem_id="layer")
        self.size = gr.Slider(
            nearest_sizes(own.default_size // 3, own.patch_size, own.stride)[0],
            largest_size(own),
            value=own.default_size,
            step=own.stride,
            label="Image size (pixels)",
            elem_id="size",
        )
        exact = model.methods[0] == "exact"
        self.views = gr.Slider(
            8, MOST_VIEWS, value=Settings.views, step=8, label="Views (exact)", interactive=exact, elem_id="views"
        )
        self.wide = gr.Checkbox(
            label="Wide crops (exact)",
            info="each covers 0.4 to 1 of the photo instead of 0.1 to 0.5: more context, so 8 to 16 views are enough",
            interactive=exact,
            elem_id="wide",
        )
        self.scale = gr.Slider(
            1, MOST_SCALE, value=1, step=1, label="Output scale (exact)", interactive=exact, elem_id="scale"
        )
        self.run = gr.Button("Denoise", variant="primary", elem_id="run")

    def _results(self) -> None:
        self.kind = gr.Radio([*MAPS.items()], value="pca", label="Map", elem_id="map")
        self.compare = gr.ImageSlider(
            label="Raw (left) and denoised (right)",
            format="png",
            interactive=False,
            buttons=["fullscreen"],
            max_height=560,
            elem_id="compare",
            elem_classes="map",
        )
        self.legend = gr.Markdown(LEGENDS["pca"], elem_id="legend")
        self.divide = gr.Slider(0, 100, value=50, step=1, label="Divider position (%)", elem_id="divide")
        gr.Markdown("### Similarity to a patch\nClick a patch in any of the three pictures, or enter its position.")
        with gr.Row():
            self.picture = _clickable("Photo", "photo")
            self.raw = _clickable("Raw: similarity", "similar-raw")
            self.clean = _clickable("Denoised: similarity", "similar-denoised")
        with gr.Row():
            self.row = gr.Number(None, label="Row", precision=0, minimum=0, elem_id="row", min_width=100)
            self.column = gr.Number(None, label="Column", precision=0, minimum=0, elem_id="column", min_width=100)
        self.figures = gr.HTML(elem_id="figures", apply_default_css=False)
        with gr.Row():
            self.features = gr.DownloadButton("Features (.safetensors)", interactive=False, elem_id="features")
            self.sheet = gr.DownloadButton("Picture (.png)", interactive=False, elem_id="sheet")


def build(handlers: Handlers) -> gr.Blocks:
    """The page, ready to launch."""
    with gr.Blocks(
        title="denoising-vit", analytics_enabled=False, delete_cache=(_TIDYING, int(LIFETIME)), fill_width=False
    ) as page:
        answer = gr.State(None, time_to_live=LIFETIME, delete_callback=handlers.keep.forget)
        controls = _Controls(handlers.models, handlers.samples)
        _wire_settings(page, controls, handlers, answer)
        _wire_results(controls, handlers, answer)
        page.unload(handlers.leave)
    page.queue(max_size=32, api_open=False)
    return page


def _wire_settings(page: gr.Blocks, controls: _Controls, handlers: Handlers, answer: gr.State) -> None:
    results = [controls.compare, controls.raw, controls.clean, controls.figures, controls.features, controls.sheet]
    shown = [controls.photo, controls.about_photo, controls.picture, answer, *results]
    light: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", "concurrency_limit": 2}
    page.load(handlers.choose, [controls.sample, answer], shown, **light)
    controls.sample.change(handlers.choose, [controls.sample, answer], shown, **light)
    controls.upload.upload(handlers.upload, [controls.upload, answer], shown, **light)
    controls.backbone.change(
        handlers.choose_backbone,
        controls.backbone,
        [controls.layer, controls.size, controls.method, controls.about_backbone],
        **light,
    )
    controls.layer.input(
        handlers.choose_layer,
        [controls.backbone, controls.layer, controls.method],
        [controls.method, controls.about_backbone],
        **light,
    )
    only_exact = [controls.views, controls.wide, controls.scale]
    controls.method.change(_only_exact, controls.method, only_exact, **light)


def _wire_results(controls: _Controls, handlers: Handlers, answer: gr.State) -> None:
    light: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 2}
    asked = [controls.backbone, controls.method, controls.layer, controls.size]
    asked += [controls.views, controls.wide, controls.scale]
    pictures = [controls.compare, controls.picture, controls.raw, controls.clean]
    place = [controls.row, controls.column]
    controls.run.click(
        handlers.run,
        [controls.photo, *asked, controls.kind, answer],
        [answer, *pictures, controls.legend, *place, controls.figures, controls.features, controls.sheet],
        concurrency_limit=1,  # one answer at a time; other visitors see their position in the queue
        trigger_mode="multiple",
        api_visibility="private",
        show_progress_on=controls.compare,
    ).success(handlers.draw, answer, controls.sheet, **light)
    controls.kind.input(handlers.switch, [answer, controls.kind, *place], [controls.compare, controls.legend], **light)
    controls.divide.input(_divided, controls.divide, controls.compare, **light)
    for picture in (controls.picture, controls.raw, controls.clean):
        picture.select(handlers.click, [answer, controls.kind], [*place, *pictures], **light)
    for number in place:
        number.input(
            handlers.type_patch, [answer, controls.kind, *place], pictures, trigger_mode="always_last", **light
        )


def _clickable(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=[],
        min_width=200,
        elem_id=name,
        elem_classes=["map", "pick"],
        alt_text=label,
    )


def _only_exact(method: str) -> tuple[Any, Any, Any]:
    """Enable views, wide crops and output scale for the exact method only."""
    exact = method == "exact"
    return gr.Slider(interactive=exact), gr.Checkbox(interactive=exact), gr.Slider(interactive=exact)


def _divided(share: float) -> Any:
    """Move the divider by keyboard."""
    return gr.ImageSlider(slider_position=share)


def _label(name: str, models: Models) -> str:
    """Label of a backbone in the list; marks backbones whose weights are not on this computer."""
    missing = "" if models.at_hand(name) else "not downloaded: "
    return f"{missing}{name}" + (f", {SEEDS[name].family}" if name in SEEDS else "")


#: Shows maps without smoothing, and keeps everything within the width of the screen.
CSS = """
.gradio-container { max-width: 1280px !important; }
.min_value, .max_value { color: var(--block-info-text-color) !important; }
.map img, .map canvas { image-rendering: pixelated; }
.pick img { cursor: crosshair; }
table.figures { width: 100%; border-collapse: collapse; font-size: 0.9rem; }
#backbone input, #sample input { text-overflow: ellipsis; margin-right: 1.2rem; }
table.figures th, table.figures td { text-align: left; vertical-align: top; padding: 0.35rem 0.6rem 0.35rem 0; }
table.figures tr { border-bottom: 1px solid var(--border-color-primary); }
table.figures td:not(:last-child) { white-space: nowrap; }
:is(button, input, a, [tabindex]):focus-visible, label:has(input[type=radio]:focus-visible) {
  outline: 3px solid var(--color-accent) !important; outline-offset: 2px;
}
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  table.figures, table.figures tbody, table.figures tr { display: block; }
  table.figures thead { display: none; }
  table.figures tr { padding: 0.4rem 0; }
  table.figures th { display: block; padding-bottom: 0; }
  table.figures td { display: inline; }
  table.figures td.raw::before { content: "raw "; }
  table.figures td.denoised::before { content: "denoised "; }
  table.figures td:last-child { display: block; }
}
"""


def theme() -> Base:
    """Gradio's default theme with system fonts, so that nothing is downloaded."""
    return Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
    )
