/**
 * New state for what Node draws random values from and keeps in memory. Each thread has its own. It knows nothing of forks: it is
 * told when everything must be new.
 */
import crypto = require('node:crypto')
import nodeModule = require('node:module')

import replace = require('./replace.cjs')

/** Node fetches so many UUIDs' and integers' bytes at once (lib/internal/crypto/random.js), and hands them out one by one. */
const UUIDS_AT_ONCE = 128
const INTEGERS_AT_ONCE = 1024

/** sfc32 (PractRand): four words of state, fast in plain JavaScript, of good quality. */
class Generator {
  #a = 0
  #b = 0
  #c = 0
  #counter = 0

  constructor() {
    this.seed()
  }

  seed(): void {
    const words = crypto.randomFillSync(new Int32Array(4))
    ;[this.#a, this.#b, this.#c, this.#counter] = words as unknown as [number, number, number, number]
    for (let i = 0; i < 12; i++) this.#word()
  }

  #word(): number {
    const result = (((this.#a + this.#b) | 0) + this.#counter) | 0
    this.#counter = (this.#counter + 1) | 0
    this.#a = this.#b ^ (this.#b >>> 9)
    this.#b = (this.#c + (this.#c << 3)) | 0
    this.#c = (this.#c << 21) | (this.#c >>> 11)
    this.#c = (this.#c + result) | 0
    return result
  }

  /** In [0, 1), with 53 bits, as Math.random has. */
  next(): number {
    return ((this.#word() >>> 5) * 0x4000000 + (this.#word() >>> 6)) / 0x20000000000000
  }
}

let generator: Generator | undefined
/** Whether what Node has drawn ahead was drawn in another process. */
let staleUuids = false
let staleIntegers = false

/**
 * Puts our own in front of what draws from memory, before the program takes a reference to any of it. V8 keeps the state of
 * Math.random, and 64 values ahead, where nobody can reach them, so that one is replaced; contexts of `vm` have one of their own,
 * which is not. Of the others, what was drawn ahead is thrown away at the first use in a fork: to do it at once takes 1.3 ms.
 */
function stand(): void {
  const own = new Generator()
  generator = own
  replace(Math, 'random', () => own.next())
  const { randomInt, randomUUID } = crypto
  const fresh = {
    uuids: () => {
      if (!staleUuids) return
      staleUuids = false
      for (let i = 0; i < UUIDS_AT_ONCE; i++) randomUUID()
    },
    integers: () => {
      if (!staleIntegers) return
      staleIntegers = false
      for (let i = 0; i < INTEGERS_AT_ONCE; i++) randomInt(1, 3)
    },
  }
  after(crypto, 'randomInt', fresh.integers)
  after(crypto, 'randomUUID', fresh.uuids)
  // Of Node 26, from the same bytes.
  after(crypto, 'randomUUIDv7', fresh.uuids)
  nodeModule.syncBuiltinESMExports()
  // Web Crypto draws from the same UUIDs.
  after(Object.getPrototypeOf(crypto.webcrypto), 'randomUUID', fresh.uuids)
}

/** Has a function of Node's run after something else. */
function after(object: object, name: string, first: () => void): void {
  const original = (object as Record<string, ((...parameters: unknown[]) => unknown) | undefined>)[name]
  if (!original) return
  replace(object, name, function (this: unknown, ...parameters: unknown[]) {
    first()
    return original.apply(this, parameters)
  })
}

/** From now on nothing is drawn that was, or could be, drawn elsewhere. OpenSSL sees by itself that its process id is another. */
function renew(): void {
  generator?.seed()
  staleUuids = true
  staleIntegers = true
}

export = { stand, renew }
