/**
 * Death signal: what a fork's root process gets from the kernel when the thread that restored it ends (prctl PR_SET_PDEATHSIG).
 * SIGSTOP: it stands still at once, and starts nothing and answers nobody any more, until the guard ends it with all that
 * descends from it. By SIGKILL its children would fall to init before the guard looks, and those among them with a cleared
 * environment and a session of their own would be found by nobody.
 */
import type { ImageSet } from '../image-set.js'

const SIGSTOP = 19

export function setDeathSignal(set: ImageSet): void {
  const root = set.processes()[0]!
  const core = set.core(root.pid)
  if (!core.thread) return
  core.thread.deathSignal = SIGSTOP
  set.putCore(root.pid, core)
}
