"""Every figure in README, docs and model card comes out of a results file: `make figures`.

    python -m scripts.figures           fill the marked places
    python -m scripts.figures --check   only say which pages disagree

A table stands between two marks, and the command rewrites what is between them:

    <!-- figures: race, cost -->
    <!-- end -->

So does a number in a sentence: <!--= shipped/prompts/cfg 2.5/all as % -->97.5 %<!--/-->. Before `as` is a path into a
results file (`results.py`), behind it how to write the number (`FORMATS`). `tables.py` holds the tables by their name.
"""
