"""Write the tables and draw the plots: ``python -m benchmarks.report``."""

from . import PERFORMANCE, README, RESULTS, fill, plots, read_tables
from .records import read_folder

written = read_tables()
for document in (README, PERFORMANCE):
    document.write_text(fill(document.read_text(), written))
plots.draw_all(read_folder(RESULTS), PERFORMANCE.parent)
