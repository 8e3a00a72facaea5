/**
 * How a program gets its agent: variables of the runtimes that warmfork has agents for, added to what is there. Each is
 * ignored by every other program. It starts nothing, and speaks to nobody.
 */
import { cpSync, existsSync, mkdirSync } from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { SOCKET_VARIABLE } from './protocol.js'

/** `src/agents/` and `dist/agents/` lie equally deep. */
const root = fileURLToPath(new URL('../../', import.meta.url))

/** Where the agents' files lie, by runtime. */
export interface AgentFiles {
  /** A CommonJS module for `node --require`. */
  readonly node: string
  /** A directory for PYTHONPATH. */
  readonly python: string
  /** A file for `ruby -r`. */
  readonly ruby: string
}

const OWN: AgentFiles = {
  node: join(root, 'dist/agents/node/agent.cjs'),
  python: join(root, 'src/agents/python'),
  ruby: join(root, 'src/agents/ruby/warmfork/agent.rb'),
}

export function ownAgentFiles(): AgentFiles {
  return OWN
}

/** Copies the agents into a directory that the workers' user can read: a package below /root is not for others. */
export function installAgents(directory: string): AgentFiles {
  const files: AgentFiles = {
    node: join(directory, 'node/agent.cjs'),
    python: join(directory, 'python'),
    ruby: join(directory, 'ruby/warmfork/agent.rb'),
  }
  mkdirSync(directory, { recursive: true, mode: 0o711 })
  const directories: [string, string][] = [
    [dirname(OWN.node), dirname(files.node)],
    [OWN.python, files.python],
    [dirname(dirname(OWN.ruby)), dirname(dirname(files.ruby))],
  ]
  for (const [from, to] of directories) {
    if (existsSync(from)) cpSync(from, to, { recursive: true, force: true })
  }
  return files
}

/** The environment of a program, with its agents and the socket that they connect to. */
export function agentEnvironment(
  env: Readonly<Record<string, string>>,
  socket: string,
  files: AgentFiles = OWN,
): Record<string, string> {
  const result: Record<string, string> = { ...env, [SOCKET_VARIABLE]: socket }
  const add = (name: string, words: string, separator: string) => {
    result[name] = env[name] ? `${words}${separator}${env[name]}` : words
  }
  if (existsSync(files.node)) add('NODE_OPTIONS', `--require ${quoteForNode(files.node)}`, ' ')
  if (existsSync(files.python)) add('PYTHONPATH', files.python, delimiter)
  // Ruby splits RUBYOPT at spaces, and has no way to escape them.
  if (existsSync(files.ruby) && !/\s/.test(files.ruby)) add('RUBYOPT', `-r${files.ruby}`, ' ')
  return result
}

/** NODE_OPTIONS is split at spaces outside of double quotes, where a backslash escapes. */
function quoteForNode(path: string): string {
  return /[\s"\\]/.test(path) ? `"${path.replace(/["\\]/g, '\\$&')}"` : path
}
