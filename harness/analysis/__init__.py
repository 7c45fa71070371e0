"""Tidy frames of runs, to statistics, to figures, tables and one report page. Needs no torch."""
