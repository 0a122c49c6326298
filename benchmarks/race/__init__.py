"""The race of the accelerators: who runs (`contenders`), on what (`arena`), how it is measured and shown."""
