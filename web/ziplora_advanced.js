// Advanced inputs of the pack's nodes out of sight on the canvas, where the frontend itself leaves them there.

import { app } from "../../scripts/app.js";

const WORDS = {
  en: { more: "More options", fewer: "Fewer options" },
  zh: { more: "更多选项", fewer: "收起选项" },
};

const isOurs = (node) => node.constructor?.nodeData?.category?.startsWith("ZipLoRA");

function words() {
  return WORDS[app.extensionManager?.setting?.get?.("Comfy.Locale")] ?? WORDS.en;
}

/** A button that the frontend does not have for it; in no file and in no queue. */
function addButton(node) {
  const label = () => words()[node.showAdvanced ? "fewer" : "more"];
  const button = node.addWidget("button", label(), null, () => node.toggleAdvanced(), { serialize: false });
  button.serialize = false;
  const toggle = node.toggleAdvanced;
  node.toggleAdvanced = function () {
    const wasShown = node.showAdvanced;
    toggle.apply(this);
    button.label = label();
    if (wasShown) node.setSize([node.size[0], node.computeSize()[1]]);
  };
  const configure = node.onConfigure;
  node.onConfigure = function (saved) {
    const answer = configure?.apply(this, arguments);
    node.showAdvanced = Boolean(saved?.showAdvanced);
    button.label = label();
    return answer;
  };
}

app.registerExtension({
  name: "ziplora.advanced",
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const left = node.widgets?.filter((widget) => widget.options?.advanced && !widget.advanced) ?? [];
    if (!left.length || !node.toggleAdvanced) return;
    for (const widget of left) widget.advanced = true;
    addButton(node);
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});
