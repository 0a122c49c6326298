"""Every picture of the tree, made anew: `make pictures`, or `make pictures PICTURES=freecus` for some of them.

    python -m scripts.pictures                 all of them, some minutes on two cores
    python -m scripts.pictures freecus "CPU 0" those whose path has one of these words in it
    python -m scripts.pictures --list          what there is, and how each is made
    python -m scripts.pictures --times         the thumbnails, and how long the CPU workflows take: a results file

`table.py` says which function makes which file. The functions draw with the embedded models on a real ComfyUI, and take
screenshots of its real page (`studio.py`); `sheet.py` puts pictures together.
"""
