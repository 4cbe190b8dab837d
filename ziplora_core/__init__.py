"""ZipLoRA (arXiv 2311.13600) in pure torch: sets of LoRAs, merger coefficients, objective, solver, figures.

Nothing here imports the host. `lora_set` says what LoRAs of one model are, `merge` how they become one,
`objective` what a good merge costs, `solver` what every solver is given and answers, `gradient` and
`layerwise` two of them, `zipper` which is taken, `analysis` how aligned they are, `blocks` where a layer lies,
`files` how a LoRA file is read and refused,
`export` how a merge becomes one, `saved` how coefficients are kept.
"""

__version__ = "0.1.0"  # as in pyproject.toml
