// Zip LoRAs, bypassed, draws the plain stack: a node that brings its own LoRAs would leave the bare model otherwise.

import { app } from "../../scripts/app.js";

const ALWAYS = 0; // the frontend's modes of a node
const NEVER = 2;
const BYPASSED = 4;
const NO_FILE = "[None]";
const OWN = ["subject_lora", "style_lora"];
const STACKED = "stacked"; // of quality: what two LoRA loaders in a row give

/** Bypassed nodes of ours that are queued, each with its id in the queue, also those in subgraphs. */
function* bypassed(graph, path = []) {
  for (const node of graph?.nodes ?? []) {
    const id = [...path, node.id];
    if (node.comfyClass === "ZipLoRAs" && node.mode === BYPASSED) yield [node, id.join(":")];
    const runs = node.mode !== NEVER && node.mode !== BYPASSED;
    if (runs && node.isSubgraphNode?.()) yield* bypassed(node.subgraph, id);
  }
}

/**
 * Whether a node brings LoRAs that can be stacked, by the inputs that would be queued: links from nodes that do not run
 * are not among them. LoRAs of loaders before it are on its model, which a bypass hands on as it is.
 */
function canStack(node, inputs) {
  const needed = Object.keys(node.constructor.nodeData?.input?.required ?? {});
  if (!needed.every((name) => name in inputs)) return false;
  const own = OWN.filter((name) => inputs[name] !== NO_FILE);
  const isThere = (name) => {
    const values = node.widgets?.find((widget) => widget.name === name)?.options?.values;
    return Array.isArray(inputs[name]) || !Array.isArray(values) || values.includes(inputs[name]);
  };
  if (!own.every(isThere)) return false;
  if ("lora_stack" in inputs) return true;
  const isTwo = own.length === OWN.length && inputs[OWN[0]] !== inputs[OWN[1]];
  return isTwo && !String(inputs.stack_prompts ?? "").trim();
}

/** What a call gives while nodes are not bypassed; no undo step is made of that. */
async function withoutBypass(nodes, call) {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker) tracker.changeCount += 1;
  for (const node of nodes) node.mode = ALWAYS;
  try {
    return await call();
  } finally {
    for (const node of nodes) if (node.mode === ALWAYS) node.mode = BYPASSED;
    if (tracker) tracker.changeCount -= 1;
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

/** The prompt of a graph. make(): as the frontend makes it, which also bypasses nodes that could not run. */
async function promptOf(graph, make) {
  let found = [...bypassed(graph)];
  while (found.length) {
    const nodes = [...new Set(found.map(([node]) => node))];
    const prompt = await withoutBypass(nodes, make);
    const queued = found.filter(([, id]) => prompt.output?.[id]);
    const failing = queued.filter(([node, id]) => !canStack(node, prompt.output[id].inputs)).map(([node]) => node);
    if (!failing.length) {
      for (const [, id] of queued) prompt.output[id].inputs.quality = STACKED;
      markBypassed(prompt.workflow, nodes);
      return prompt;
    }
    found = found.filter(([node]) => !failing.includes(node));
  }
  return make();
}

app.registerExtension({
  name: "ziplora.bypass",
  setup() {
    const own = app.graphToPrompt;
    if (typeof own !== "function") return; // another frontend
    let before = Promise.resolve(); // two at once would see nodes that the other has changed for its own time
    app.graphToPrompt = function (graph, ...rest) {
      const make = () => own.call(this, graph, ...rest);
      const made = before.then(() => promptOf(graph ?? this.rootGraph ?? this.graph, make));
      before = made.catch(() => {});
      return made;
    };
  },
});
