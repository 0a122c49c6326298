// Whose run an event of the server tells of.
//
// Tabs of one page have nodes of the same numbers, and other windows and programs send prompts too. So the page notes
// from which workflow it sends a prompt, and every event names its prompt. Nothing here knows the page, so that Node
// can test it.

const MOST_PROMPTS = 1000; // that were sent; a long queue is still to run
const MOST_RUNS = 20; // whose states are kept: of earlier ones, the nodes themselves keep the last

/**
 * Where a prompt comes from that the page sends now: the workflow, the number of its graph, which is another once the
 * workflow was emptied, and the kind of each node in `shown`. Null when there is none.
 *
 * @param data what the page sends: the prompt as `output`, the graph as `workflow`.
 * @param workflows ComfyUI's own store of them.
 */
export function originOf(data, { activeWorkflow, openWorkflows }, shown) {
  const graph = data?.workflow?.id;
  const isOf = (workflow) => workflow?.activeState?.id === graph;
  // The user may have gone to another tab while the prompt was put together.
  const workflow = isOf(activeWorkflow) ? activeWorkflow : (openWorkflows?.find(isOf) ?? activeWorkflow);
  const nodes = Object.entries(data?.output ?? {}).map(([id, node]) => [id, node?.class_type]);
  const kinds = new Map(nodes.filter(([, kind]) => shown.has(kind)));
  return kinds.size ? Object.freeze({ workflow, graph, kinds }) : null;
}

/** What is known of the runs of prompts, whichever comes first: the prompt's origin or its events. */
export class Runs {
  #origins = new Map(); // prompt -> origin
  #states = new Map(); // prompt -> execution id of a node -> state

  /** The server took a prompt. */
  sent(prompt, origin) {
    this.#origins.set(prompt, origin);
    shorten(this.#origins, MOST_PROMPTS);
  }

  /** An event: `next` makes of a state, or of `first`, the one that follows. */
  told({ prompt_id: prompt, node }, next, first) {
    const states = this.#states.get(prompt) ?? new Map();
    states.set(node, next(states.get(node) ?? first));
    this.#states.set(prompt, states);
    shorten(this.#states, MOST_RUNS);
  }

  /** What is to be shown, the newest run last: `origin`, `node` and `state`. Of one prompt, or of all. */
  shown(prompt = null) {
    const prompts = prompt === null ? [...this.#states.keys()] : [prompt];
    return prompts.flatMap((each) => {
      const origin = this.#origins.get(each);
      const states = [...(this.#states.get(each) ?? [])].filter(([node]) => origin?.kinds.has(node));
      return states.map(([node, state]) => ({ origin, node, state }));
    });
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
