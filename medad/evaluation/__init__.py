"""Evaluation: lesion masks, lesion tables, metrics, and sensitivity to inserted lesions."""
