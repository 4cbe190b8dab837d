// The pack's texts in the page's language, where the frontend drops them; what choices and empty prompts say in it.

import { app } from "../../scripts/app.js";
import { ours, texts, word } from "./ziplora_words.js";

let known = {}; // by language, of every pack, once it has come

/** The frontend's translations. Undefined where it keeps them elsewhere. */
function translations() {
  const page = document.getElementById("vue-app")?.__vue_app__;
  const found = page?._context?.provides?.[page.__VUE_I18N_SYMBOL__]?.global;
  return typeof found?.mergeLocaleMessage === "function" ? found : undefined;
}

function merge(global, language) {
  if (known[language]) global.mergeLocaleMessage(language, known[language]);
}

/** A frontend that loads a language late replaces what it had merged of packs: merged again, then and each time. */
async function keep() {
  const global = translations();
  known = await texts;
  if (!global) return;
  const own = global.setLocaleMessage;
  global.setLocaleMessage = function (language, ...rest) {
    const answer = own.call(this, language, ...rest);
    merge(global, language);
    return answer;
  };
  for (const language of global.availableLocales) merge(global, language);
}

/** What the choices of an input are called; the values, in files and queues, stay. */
function name(node, widget) {
  const options = widget.options;
  if (!options || !Array.isArray(options.values)) return;
  const own = options.getOptionLabel;
  options.getOptionLabel = function (value) {
    const names = ours().choices?.[node.comfyClass]?.[widget.name];
    return names?.[value] ?? own?.call(this, value) ?? value ?? "";
  };
}

/** What stands in a text as long as it is empty, for which the frontend asks no language. */
function fillIn(widget) {
  const text = widget.inputEl ?? widget.element;
  if (widget.options?.placeholder) widget.options.placeholder = word(widget.options.placeholder);
  if (text?.placeholder) text.placeholder = word(text.placeholder);
}

const isOurs = (node) => node.constructor?.nodeData?.category?.startsWith("ZipLoRA");

const isNamed = (node) => (widget) =>
  Object.values(known).some((of) => of.ziplora?.choices?.[node.comfyClass]?.[widget.name]);

app.registerExtension({
  name: "ziplora.language",
  init: keep, // awaited, before nodes get their titles
  nodeCreated(node) {
    for (const widget of node.widgets?.filter(isNamed(node)) ?? []) name(node, widget);
    if (isOurs(node)) node.widgets?.forEach(fillIn);
  },
});
