// What the pack says in the page's language: its locale files, asked for once for all scripts.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let known = {}; // by language, of every pack, once it has come

/** The same, awaited: what the frontend itself asks for as it starts. */
export const texts = api
  .fetchApi("/i18n")
  .then((answer) => (answer.ok ? answer.json() : {}))
  .catch(() => ({}))
  .then((found) => (known = found));

/** The pack's own texts, beside those of its nodes, in the page's language: words and names of choices. */
export function ours() {
  return known[app.extensionManager?.setting?.get?.("Comfy.Locale")]?.ziplora ?? {};
}

/** An English text of a script in the page's language; as it is where a language lacks it. */
export function word(english) {
  return ours().words?.[english] ?? english;
}
