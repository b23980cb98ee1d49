"""Know before you clean: whether a backbone has artifacts, of which kind, and whether cleaning is worth it."""

from denoising_vit.diagnosis.diagnose import Diagnosis, diagnose, run_diagnosis
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.diagnosis.verdict import Finding, Judgement, Verdict

__all__ = ["DiagnoseOptions", "Diagnosis", "Finding", "Judgement", "Verdict", "diagnose", "run_diagnosis"]
