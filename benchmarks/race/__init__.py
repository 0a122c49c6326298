"""The race of the accelerators: who runs (`contenders`), on what (`arena`), with which settings (`grids`), at what cost (`cost`)."""
