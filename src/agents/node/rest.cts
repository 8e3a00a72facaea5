/**
 * Brings a process to the point at which none of its requests is in hand, and holds back those that come: as docs/agent-protocol.md
 * has it, in the main thread and in Workers. It knows no supervisor.
 */
import timers = require('node:timers')

import requests = require('./requests.cjs')
import type threads = require('./threads.cjs')

/** Tests of programs replace that of the global object. */
const { setImmediate } = timers

type Threads = InstanceType<typeof threads.Threads>

/** How often is looked at what tells nobody of its end: requests of Workers, event streams that begin. */
const LOOK_MS = 5

/**
 * Resolves when none is in hand; what comes from then on is held back until `letGo`. Else with what is in hand yet, and nothing is
 * held back.
 * @param isInVain whether what is in hand waits for what does not come before the checkpoint
 */
async function untilNoneInHand(
  others: Threads | undefined,
  timeoutMs: number,
  deadline: number,
  isInVain: () => boolean,
): Promise<string | undefined> {
  const holdMs = timeoutMs / 4
  const look = () => {
    const own = requests.inHand()
    const theirs = others?.inHand() ?? { count: 0, oldest: undefined }
    const [oldest] = [own.oldest, theirs.oldest].filter((one) => one !== undefined).sort((a, b) => b.ageMs - a.ageMs)
    return { count: own.count + theirs.count, oldest }
  }
  const until = async (isSo: () => boolean, end: number) => {
    while (!isSo()) {
      const left = end - Date.now()
      if (left <= 0 || isInVain()) return false
      await requests.nextEnd(Math.min(left, LOOK_MS))
    }
    return true
  }
  for (;;) {
    // One that takes long is not to hold up all that come after it.
    others?.look(false)
    const hasBegun = await until(() => (look().oldest?.ageMs ?? 0) <= holdMs, deadline)
    if (hasBegun) {
      requests.holdBack()
      others?.look(true)
      if (await until(() => look().count === 0, Math.min(deadline, Date.now() + holdMs))) {
        // A stream of HTTP/2 is closed, and this runs, before its last frames are given to the kernel.
        await new Promise((resolve) => setImmediate(resolve))
        return undefined
      }
    }
    const { count, oldest } = look()
    letGo(others)
    if (Date.now() < deadline && !isInVain()) continue
    const many = count === 1 ? '1 request is in hand, for' : `${count} requests are in hand, the oldest for`
    const why = isInVain() ? '; the program has asked for a fork of itself meanwhile' : ''
    return `${many} ${oldest?.ageMs} ms: ${oldest?.what}${why}`
  }
}

/** Gives the program what was held back. */
function letGo(others: Threads | undefined): void {
  others?.letGo()
  requests.letGo()
}

export = { untilNoneInHand, letGo }
