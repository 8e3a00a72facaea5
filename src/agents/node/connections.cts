/**
 * TCP connections are at their end in a fork. A program that keeps some, idle in a pool or an HTTP agent, would hear it with its next
 * request on one: so they are destroyed before it goes on. It knows sockets, and nothing of forks.
 */
import net = require('node:net')

import replace = require('./replace.cjs')

/** Node names no handle that keeps no process alive, which those are that an HTTP agent keeps: they are remembered when they are made. */
const made = new Set<net.Socket>()

function watch(): void {
  const { connect } = net.Socket.prototype
  replace(net.Socket.prototype, 'connect', function (this: net.Socket, ...parameters: Parameters<typeof connect>) {
    if (!made.has(this)) {
      made.add(this)
      this.once('close', () => made.delete(this))
    }
    return connect.apply(this, parameters)
  })
}

interface Handle {
  /** Of a TLS connection, the one that it runs on. */
  readonly _parent?: object
}

function isTcp(socket: net.Socket): boolean {
  const { _handle: handle } = socket as unknown as { _handle: Handle | null }
  return (handle?._parent ?? handle)?.constructor.name === 'TCP'
}

/** Those that the program has made, and those that it has accepted. Unix connections can be to itself: a fork has a copy of them. */
function destroyAll(): net.Socket[] {
  const handles = (process as unknown as { _getActiveHandles(): unknown[] })._getActiveHandles()
  const all = [...new Set([...made, ...handles])].filter((one) => one instanceof net.Socket && isTcp(one))
  for (const one of all as net.Socket[]) one.destroy()
  return all as net.Socket[]
}

export = { watch, destroyAll }
