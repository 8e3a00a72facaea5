/** The runtimes that warmfork is tried with, in the order of the table in docs/limits.md. */
import { bun, deno, next, npmNode, runningNode } from './javascript.js'
import { java, jruby } from './jvm.js'
import { cpython, cRuntimes, go, mri, shell } from './native.js'
import type { Runtime } from './runtime.js'

export const RUNTIMES: readonly Runtime[] = [
  runningNode,
  ...['20', '22', '24', 'latest'].filter((major) => major !== process.versions.node.split('.')[0]).map(npmNode),
  next,
  bun,
  deno,
  java(17, 'G1'),
  java(17, 'Serial'),
  java(17, 'Parallel'),
  java('newest', 'G1'),
  java('newest', 'Serial'),
  java('newest', 'Parallel'),
  jruby,
  cpython,
  mri,
  go,
  shell,
  ...cRuntimes,
]

export { PROBES, PROJECT, RUNTIME_CACHE, type Runtime } from './runtime.js'
