"""The race of the accelerators.

Who runs (`contenders`), on what (`arena`), with which settings (`grids`, `tuned`), and what it costs (`cost`).
"""
