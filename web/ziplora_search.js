// The search words of the pack's nodes, searched as names are: older frontends search none, newer ones rank them last.

import { app } from "../../scripts/app.js";

// The frontend's ranks, the least the best: a name that begins with the query, and what no name has.
const BEGINS = 1;
const WORST = 9;
const BEHIND_NAMES = 6;

const isOurs = (found) => found.category?.startsWith("ZipLoRA");

/** How well a query fits a node, as the frontend scores it: [rank, how rare it is, place, length, ...].
 * A search word that is the query counts as a name that begins with it, one that holds it less than any name. */
function score(search, query, found) {
  const [rank, rare, ...rest] = search.calcAuxScores(query, found, 0);
  const words = isOurs(found) ? (found.search_aliases ?? []) : [];
  if (rank > BEGINS && words.includes(query)) return [BEGINS, rare, 0, found.display_name.length];
  const fits = rank > BEHIND_NAMES && words.some((word) => search.calcAuxSingle(query, word, 0)[0] < WORST);
  return [fits ? BEHIND_NAMES : rank, rare, ...rest];
}

/** What a search found, and our nodes whose words fit, in the order of their scores. */
function withWords(search, query, found, fits) {
  const rank = new Map(search.data.filter(isOurs).map((node) => [node, score(search, query, node)]));
  const more = [...rank.keys()].filter((node) => rank.get(node)[0] < WORST && !found.includes(node) && fits(node));
  for (const node of found) if (!rank.has(node)) rank.set(node, score(search, query, node));
  return [...found, ...more].sort((one, other) => search.compareAux(rank.get(one), rank.get(other)));
}

function teach(service) {
  const kind = Object.getPrototypeOf(service);
  const search = service.nodeFuseSearch;
  const needs = [kind?.searchNode, search?.calcAuxScores, search?.calcAuxSingle, search?.compareAux];
  if (!needs.every((known) => typeof known === "function") || !Array.isArray(search.data)) return; // another frontend
  const own = kind.searchNode;
  kind.searchNode = function (query, filters = [], options = undefined, extra = {}) {
    const found = own.call(this, query, filters, undefined, extra);
    const wildcard = (extra?.matchWildcards ?? true) ? "*" : undefined;
    const fits = (node) => filters.every(({ filterDef, value }) => filterDef.matches(node, value, { wildcard }));
    const asked = query?.trim().toLowerCase();
    const all = asked ? withWords(this.nodeFuseSearch, asked, found, fits) : found;
    return options?.limit ? all.slice(0, options.limit) : all;
  };
}

app.registerExtension({
  name: "ziplora.search",
  setup() {
    const service = app.extensionManager?._p?._s?.get?.("nodeDef")?.nodeSearchService; // the page's own stores
    if (service) teach(service);
  },
});
