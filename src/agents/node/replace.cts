/** How a function of Node's is replaced by one of ours. */

/** With the name, the parameters' count and the attributes of the original. @returns whether it could be */
function replace(object: object, name: string, own: unknown): boolean {
  const original = Object.getOwnPropertyDescriptor(object, name)
  if (!original?.configurable || typeof original.value !== 'function') return false
  for (const key of ['name', 'length'] as const) {
    Object.defineProperty(own, key, { value: original.value[key], configurable: true })
  }
  Object.defineProperty(object, name, { ...original, value: own })
  return true
}

export = replace
