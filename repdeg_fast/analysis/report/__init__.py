"""Reports of an embedding and of a model: what was found in sentences, then pictures; HTML, JSON and PNGs."""

from repdeg_fast.analysis.report.embedding import embedding_report
from repdeg_fast.analysis.report.model import model_report
from repdeg_fast.analysis.report.page import Report, write

__all__ = ["Report", "embedding_report", "model_report", "write"]
