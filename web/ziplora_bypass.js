// Zip LoRAs, bypassed, draws the plain stack: a node that brings its own LoRAs would leave the bare model otherwise.

import { app } from "../../scripts/app.js";

const ALWAYS = 0; // the frontend's modes of a node
const NEVER = 2;
const BYPASSED = 4;
const NO_FILE = "[None]";
const STACKED = "stacked"; // of quality: what two LoRA loaders in a row give

/** Whether a node brings LoRAs. Those of loaders before it are on its model, which a bypass hands on as it is. */
function brings(node) {
  const isLinked = (name) => node.inputs?.some((input) => input.name === name && input.link != null);
  const isChosen = (name) => isLinked(name) || node.widgets?.find((found) => found.name === name)?.value !== NO_FILE;
  return isLinked("lora_stack") || isChosen("subject_lora") || isChosen("style_lora");
}

/** Bypassed nodes of ours that are queued, each with its id in the queue, also those in subgraphs. */
function* bypassed(graph, path = []) {
  for (const node of graph?.nodes ?? []) {
    const id = [...path, node.id];
    if (node.comfyClass === "ZipLoRAs" && node.mode === BYPASSED && brings(node)) yield [node, id.join(":")];
    const runs = node.mode !== NEVER && node.mode !== BYPASSED;
    if (runs && node.isSubgraphNode?.()) yield* bypassed(node.subgraph, id);
  }
}

/** What is saved with a picture shows them bypassed, as the canvas does. */
function markBypassed(workflow, nodes) {
  const graphs = [workflow, ...(workflow?.definitions?.subgraphs ?? [])];
  for (const node of nodes) {
    const graph = graphs.find((found) => found?.id === node.graph?.id) ?? workflow;
    const saved = graph?.nodes?.find((found) => String(found.id) === String(node.id));
    if (saved) saved.mode = BYPASSED;
  }
}

app.registerExtension({
  name: "ziplora.bypass",
  setup() {
    const own = app.graphToPrompt;
    if (typeof own !== "function") return; // another frontend
    app.graphToPrompt = async function (graph, ...rest) {
      const found = [...bypassed(graph ?? this.rootGraph ?? this.graph)];
      if (!found.length) return own.call(this, graph, ...rest);
      const nodes = [...new Set(found.map(([node]) => node))];
      let prompt;
      for (const node of nodes) node.mode = ALWAYS;
      try {
        prompt = await own.call(this, graph, ...rest);
      } finally {
        for (const node of nodes) node.mode = BYPASSED;
      }
      for (const [, id] of found) if (prompt.output?.[id]) prompt.output[id].inputs.quality = STACKED;
      markBypassed(prompt.workflow, nodes);
      return prompt;
    };
  },
});
