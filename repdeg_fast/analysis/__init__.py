"""Looking at models: what was measured in them, saved and drawn."""

from repdeg_fast.analysis.admin import plot_table, save_table

__all__ = ["plot_table", "save_table"]
