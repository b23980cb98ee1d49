"""A page in the browser: clean the features of one's own photos, and look at them. Needs the extra `app`."""

from __future__ import annotations

from denoising_vit.show.app.options import AppOptions

__all__ = ["AppOptions"]
