// Trigger words on nodes that choose LoRA files: as placeholders of their own prompts, by a button, and pictures.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { word } from "./ziplora_words.js";

// By node: the widgets that choose files, and where the prompt of each is written. isOwn: whether those are the node's
// own, in which nothing stands for the file's words, so that a placeholder may say so; an empty CLIP Text Encode means
// an empty prompt.
const BOXES = {
  files: ["subject_lora", "style_lora"],
  isOwn: true,
  prompts: (node) => ["subject_prompt", "style_prompt"].map((name) => written(node, name)),
};
const NODES = {
  ZipLoRAs: BOXES,
  ZipCheck: BOXES,
  LoadLoRAPair: {
    files: ["content_lora", "style_lora"],
    prompts: (node) => ["content_positive", "style_positive"].map((input) => encoder(node, input)),
  },
};
const PICTURES = "ziplora_pictures";
const HEIGHT = 104; // pixels
const FARTHEST = 8; // nodes between a prompt and ZipLoRA Optimize

const widget = (node, name) => node.widgets?.find((found) => found.name === name);

const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

/** A widget whose text is the node's own, not another node's. */
function written(node, name) {
  return isLinked(node, name) ? undefined : widget(node, name);
}

function source(node, name) {
  const link = node.inputs?.find((input) => input.name === name)?.link;
  const found = link == null ? undefined : (node.graph.links.get?.(link) ?? node.graph.links[link]);
  return found && node.graph.getNodeById(found.origin_id);
}

function targets(node) {
  const links = (node.outputs ?? []).flatMap((output) => output.links ?? []);
  const found = links.map((link) => node.graph.links.get?.(link) ?? node.graph.links[link]);
  return found.map((link) => link && node.graph.getNodeById(link.target_id)).filter(Boolean);
}

/** The text of the encoder that leads to an input of the ZipLoRA Optimize behind a pair. */
function encoder(pair, input) {
  const optimize = targets(pair).find((node) => node.comfyClass === "ZipLoRAOptimize");
  let node = optimize && source(optimize, input);
  for (let step = 0; node && step < FARTHEST; step++) {
    if (node.comfyClass === "CLIPTextEncode") return written(node, "text");
    const before = node.inputs?.find((found) => found.type === "CONDITIONING");
    node = before && source(node, before.name);
  }
}

async function ask(name) {
  if (typeof name !== "string" || !/\.\w+$/.test(name)) return undefined; // no file is chosen
  try {
    const answer = await api.fetchApi(`/ziplora/lora?name=${encodeURIComponent(name)}`);
    return answer.ok ? { name, ...(await answer.json()) } : undefined;
  } catch {
    return undefined; // a server without the route, or none
  }
}

const ordinary = new WeakMap(); // placeholder of a text before ours

function placeholders(prompts, known) {
  prompts.forEach((prompt, place) => {
    const text = prompt?.inputEl ?? prompt?.element;
    if (!text || !("placeholder" in text)) return;
    if (!ordinary.has(text)) ordinary.set(text, text.placeholder);
    text.placeholder = known[place]?.prompt || ordinary.get(text);
  });
}

/** The prompt with a LoRA's words: as it is where they are in it, behind them where it says something else. */
function withWords(text, words) {
  if (!words || text.toLowerCase().includes(words.toLowerCase())) return text;
  return text.trim() ? `${words}, ${text.trim()}` : words;
}

function fill(node, kind, known) {
  kind.prompts(node).forEach((prompt, place) => {
    if (!prompt || !known[place]?.prompt) return;
    const text = withWords(String(prompt.value ?? ""), known[place].prompt);
    if (text === prompt.value) return;
    prompt.value = text;
    prompt.callback?.(text);
  });
  app.graph.setDirtyCanvas(true, true);
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.(); // so that it can be undone
}

function remove(node, found) {
  const place = found ? node.widgets.indexOf(found) : -1;
  if (place < 0) return;
  found.onRemove?.();
  node.widgets.splice(place, 1);
}

function fit(node) {
  const size = node.computeSize();
  node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])]);
  node.setDirtyCanvas?.(true, true);
}

/** Both only where there is something to use or to show, behind the node's own widgets, and in no file or queue. */
function show(node, kind, known) {
  const before = node.widgets.length;
  const drawn = known.filter((about) => about?.has_thumbnail);
  remove(node, node.ziploraButton);
  remove(node, widget(node, PICTURES));
  node.ziploraButton = undefined;
  if (known.some((about) => about?.prompt)) {
    const use = () => fill(node, kind, known);
    node.ziploraButton = node.addWidget("button", word("Use trigger words"), null, use, { serialize: false });
    node.ziploraButton.serialize = false;
    const said = known.filter((about) => about?.prompt);
    node.ziploraButton.tooltip = said.map((about) => `${about.name}: ${about.prompt} (${about.source})`).join("\n");
  }
  if (drawn.length && node.addDOMWidget) {
    const row = document.createElement("div");
    row.style.cssText = "display: flex; gap: 4px; justify-content: center; overflow: hidden";
    for (const { name } of drawn) {
      const picture = document.createElement("img");
      picture.src = api.apiURL(`/ziplora/lora/thumbnail?name=${encodeURIComponent(name)}`);
      picture.alt = picture.title = name;
      picture.style.cssText = "min-width: 0; max-height: 100%; object-fit: contain";
      picture.onerror = () => picture.remove();
      row.append(picture);
    }
    const height = () => HEIGHT;
    const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height };
    node.addDOMWidget(PICTURES, PICTURES, row, options).serialize = false;
  }
  if (node.widgets.length > before) fit(node);
}

async function refresh(node, kind) {
  const asked = (node.ziploraAsked = (node.ziploraAsked ?? 0) + 1);
  const names = kind.files.map((name) => written(node, name)?.value);
  const known = await Promise.all(names.map(ask));
  if (node.ziploraAsked !== asked || !node.graph) return; // another file since, or the node is gone
  if (kind.isOwn) placeholders(kind.prompts(node), known);
  show(node, kind, known);
}

app.registerExtension({
  name: "ziplora.triggers",
  nodeCreated(node) {
    const kind = NODES[node.comfyClass];
    if (!kind || !kind.files.every((name) => widget(node, name))) return;
    const again = () => setTimeout(() => refresh(node, kind)); // once the node is in a graph, with its values
    for (const name of kind.files) {
      const choice = widget(node, name);
      const own = choice.callback;
      choice.callback = function (...values) {
        const answer = own?.apply(this, values);
        again();
        return answer;
      };
    }
    for (const event of ["onConfigure", "onConnectionsChange"]) {
      const own = node[event];
      node[event] = function (...values) {
        const answer = own?.apply(this, values);
        again();
        return answer;
      };
    }
    again();
  },
});
