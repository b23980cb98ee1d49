"""How the page looks: fonts of the system, readable contrast in light and in dark, room on a phone."""

from __future__ import annotations

from gradio.themes import Base, Default

#: No pixel of a map is smoothed, and nothing is wider than the screen.
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
    """Gradio's default with fonts that every system has: nothing is fetched."""
    return Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
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
