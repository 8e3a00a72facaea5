/** Death signal: a fork's root process gets SIGKILL from the kernel when the thread that restored it ends (prctl PR_SET_PDEATHSIG). */
import type { ImageSet } from '../image-set.js'

const SIGKILL = 9

export function setDeathSignal(set: ImageSet): void {
  const root = set.processes()[0]!
  const core = set.core(root.pid)
  if (!core.thread) return
  core.thread.deathSignal = SIGKILL
  set.putCore(root.pid, core)
}
