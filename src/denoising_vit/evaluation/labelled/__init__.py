"""Labelled data sets: photos with masks of class numbers, in the layouts that they come in."""

from denoising_vit.evaluation.labelled.images import NO_LABEL, LabelledImage
from denoising_vit.evaluation.labelled.layouts import LabelledData, open_labelled
from denoising_vit.evaluation.labelled.sets import LabelledSet

__all__ = ["NO_LABEL", "LabelledData", "LabelledImage", "LabelledSet", "open_labelled"]
