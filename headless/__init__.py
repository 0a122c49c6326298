"""One workflow over a table of jobs, on this machine's devices or on a Ray cluster. `docs/headless.md` is its page.

Runs in place: `python custom_nodes/dit-toolkit/headless run WORKFLOW --table jobs.csv`. It speaks to unmodified ComfyUI
servers over HTTP, and imports neither torch nor ComfyUI nor the other rooms of the pack. ComfyUI never imports it.

    cli        the command: reads, plans, runs, says how it went
    workflow   files in three formats -> a prompt in API format
    tables     CSV, JSON Lines, Parquet -> rows
    bindings   columns -> inputs of nodes, checked before anything runs
    plan       rows -> jobs: keys, digests, the order that suits ComfyUI's cache
    ledger     what is done and what is not, on disk
    dispatch   jobs to workers, again elsewhere when one is lost
    server     one ComfyUI over HTTP
    workers    a ComfyUI process of this machine, or one that runs already
    on_ray     the same as an actor of a Ray cluster
    results    files, results.parquet, index.html
"""
