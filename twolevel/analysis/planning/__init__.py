"""The cost model and `twolevel plan`.

    workload      a network as a list of layers and the values between them
    machine       what a machine is; presets by name, or calibrate (and calibrate_links) to measure this one
    timing        seconds of a layer on a machine
    memory        bytes that a rank holds
    collectives   seconds and bytes of what crosses
    cost          a step of group and ddp; fsdp_cost, channel_cost, pipeline_cost of the others
    plan          every way to use so many ranks, and the choice; scaling over numbers of ranks
    command       what `twolevel plan` does; plan_report prints, draws and writes JSON

The formulas, and what they were checked against, are in COST_MODEL.md.
"""
