"""What the nodes need of the host: nothing else of the pack imports it.

A node's own work stands under the node's name (`apply`, `direct`, `export`, `optimize`, `saved`, `scores`, `sparse`,
`training`, `unzip`); what several of them need, in `lora`, `network`, `memory`, `drawing`, `progress` and `disk`.
"""
