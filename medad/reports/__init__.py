"""Reports of liver runs, ablations and inserted-lesion studies: HTML, JSON, CSV and LaTeX."""
