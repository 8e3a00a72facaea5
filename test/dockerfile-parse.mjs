/**
 * Reads a Dockerfile into its instructions. It knows the syntax (continued lines, comments, flags, JSON forms) and not what an
 * instruction does. Plain JavaScript, since the script that carries out the steps runs without a compiler.
 */

/**
 * @typedef {object} Instruction
 * @property {string} name in capitals
 * @property {number} line where it begins, from 1
 * @property {string} text all behind the name, continued lines joined
 * @property {Record<string, string>} flags `--from=build` gives `from`
 * @property {string[]} args the words behind the flags, or the strings of the JSON form
 * @property {boolean} json whether it is in the JSON form
 */

/** @returns {Instruction[]} */
export function parseDockerfile(/** @type {string} */ text) {
  /** @type {Instruction[]} */
  const instructions = []
  let pending = ''
  let start = 0
  for (const [index, raw] of text.split('\n').entries()) {
    if (/^\s*(#|$)/.test(raw)) continue
    if (pending === '') start = index + 1
    if (raw.endsWith('\\')) {
      pending += `${raw.slice(0, -1)} `
      continue
    }
    instructions.push(parseInstruction(pending + raw, start))
    pending = ''
  }
  if (pending !== '') throw new Error(`line ${start}: the last line is continued`)
  return instructions
}

/** @returns {Instruction} */
function parseInstruction(/** @type {string} */ source, /** @type {number} */ line) {
  const match = /^\s*([A-Za-z]+)\s+(.*)$/s.exec(source)
  if (!match) throw new Error(`line ${line}: no instruction`)
  const name = /** @type {string} */ (match[1]).toUpperCase()
  let rest = /** @type {string} */ (match[2]).trim()
  const text = rest
  /** @type {Record<string, string>} */
  const flags = {}
  for (let flag = /^--([a-z-]+)=(\S+)\s+/.exec(rest); flag; flag = /^--([a-z-]+)=(\S+)\s+/.exec(rest)) {
    flags[/** @type {string} */ (flag[1])] = /** @type {string} */ (flag[2])
    rest = rest.slice(flag[0].length)
  }
  const json = rest.startsWith('[')
  return { name, line, text, flags, args: json ? JSON.parse(rest) : rest.split(/\s+/), json }
}

/** The instructions of each stage, its `FROM` first. */
export function stagesOf(/** @type {Instruction[]} */ instructions) {
  /** @type {Instruction[][]} */
  const stages = []
  for (const instruction of instructions) {
    if (instruction.name === 'FROM') stages.push([])
    const stage = stages.at(-1)
    if (!stage) throw new Error(`line ${instruction.line}: ${instruction.name} before FROM`)
    stage.push(instruction)
  }
  return stages
}
