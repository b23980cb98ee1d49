"""Videos of features: any extractors side by side, in colours that stay the same from the first frame to the last."""

from __future__ import annotations

from denoising_vit.show.video.options import VideoOptions
from denoising_vit.show.video.rendering import RenderedVideo, VideoMaker, render_video

__all__ = ["RenderedVideo", "VideoMaker", "VideoOptions", "render_video"]
