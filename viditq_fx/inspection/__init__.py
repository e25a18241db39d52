"""What was planned, done and refused at each site of a model, and what it weighs."""

from viditq_fx.inspection.collect import ExplainedSite, ExplainReport, explain
from viditq_fx.inspection.render import render_text

__all__ = ["ExplainReport", "ExplainedSite", "explain", "render_text"]
