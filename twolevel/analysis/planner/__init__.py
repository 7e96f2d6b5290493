"""The cost model and `twolevel plan`.

    workload      a network as a list of layers and the values between them; tracing, how it is read
    machine       what a machine is; presets by name, or calibrate (and calibrate_links) to measure this one
    timing        seconds of a layer on a machine
    footprint     bytes that a rank holds
    messages      seconds of collectives, and how much of them a computation hides (bytes: analysis/traffic)
    costs/        a step by each way to share a network, a file each
    plan          every way to use so many ranks, and the choice; study, over numbers of ranks
    command       what `twolevel plan` does; presentation prints, draws and writes JSON

The formulas, and what they were checked against, are in COST_MODEL.md.
"""
