// Whose run an event of the server tells of.
//
// Tabs of one page have nodes of the same numbers, two tabs of one template have graphs of the same id, and other
// windows and programs send prompts too. So every tab gets a mark that travels with its prompts, and every event brings
// back the mark, the graph's id, and the kind of its node. Nothing here knows the page, so that Node can test it.

const MOST_TABS = 100; // that have queued
const MOST_RUNS = 20; // whose states are kept: of earlier ones, the nodes themselves keep the last

export const MARK = "dit_toolkit.tab"; // in the "extra" of a graph that is sent; `host/execution.py` reads it

/** The marks of the tabs that have queued in this page, since it was opened. */
export class Tabs {
  #workflows = new Map(); // mark -> workflow, that queued last at the end
  #marks = new WeakMap();
  #page = Math.random().toString(36).slice(2); // a page that is opened again must not take the old one's runs
  #count = 0;

  /** The mark of the tab that queues `graph` now. */
  mark(graph, { activeWorkflow, openWorkflows }) {
    const isOf = (workflow) => workflow?.activeState?.id === graph;
    // While a tab is opened, its graph may be on the canvas and the page still say another.
    const workflow = isOf(activeWorkflow) ? activeWorkflow : (openWorkflows?.find(isOf) ?? activeWorkflow);
    if (!workflow) return null;
    const mark = this.#marks.get(workflow) ?? `${this.#page}-${++this.#count}`;
    this.#marks.set(workflow, mark);
    this.#workflows.delete(mark);
    this.#workflows.set(mark, workflow);
    shorten(this.#workflows, MOST_TABS);
    return mark;
  }

  /**
   * Where the node of an event is: its workflow, the id of its graph, which is another once the workflow was emptied,
   * and the node's kind. Null when that is not in this page. A prompt without a mark, as other extensions may send, is
   * of the only tab with its graph.
   */
  originOf({ tab, workflow: graph, kind }, { openWorkflows }) {
    if (!graph || !kind) return null;
    const same = tab ? [] : (openWorkflows ?? []).filter((workflow) => workflow?.activeState?.id === graph);
    const workflow = tab ? this.#workflows.get(tab) : same.length === 1 ? same[0] : null;
    return workflow ? Object.freeze({ workflow, graph, kind }) : null;
  }
}

/** The runs of this page's prompts, of each node the newest state. */
export class Runs {
  #runs = new Map(); // prompt -> execution id of a node -> run

  /** An event: `next` makes of a state, or of `first`, the one that follows. Null for a run of `origin` null. */
  told({ prompt_id: prompt, node }, origin, next, first) {
    const runs = this.#runs.get(prompt) ?? new Map();
    const run = runs.get(node) ?? (origin && { origin, node, state: first });
    if (!run) return null;
    const told = { ...run, state: next(run.state) };
    this.#runs.set(prompt, runs.set(node, told));
    shorten(this.#runs, MOST_RUNS);
    return told;
  }

  /** All of them, those of the newest prompt last. */
  all() {
    return [...this.#runs.values()].flatMap((runs) => [...runs.values()]);
  }
}

/** The node of an execution id in a graph as it is saved; null when it is gone. See `nodeAt` for the graph on the canvas. */
export function savedNodeAt(saved, executionId) {
  const path = String(executionId).split(":");
  const find = (nodes, id) => nodes?.find((node) => String(node.id) === id) ?? null;
  let { nodes } = saved ?? {};
  for (const id of path.slice(0, -1)) {
    const kind = find(nodes, id)?.type;
    nodes = saved?.definitions?.subgraphs?.find((subgraph) => subgraph.id === kind)?.nodes;
  }
  return find(nodes, path.at(-1));
}

function shorten(map, most) {
  for (const key of [...map.keys()].slice(0, Math.max(0, map.size - most))) map.delete(key);
}
