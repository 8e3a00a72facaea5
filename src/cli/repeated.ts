/** Parsers of flags that may be repeated. commander hands each the value before. */
import { InvalidArgumentError } from 'commander'

export function collect(text: string, before: readonly string[] = []): string[] {
  return [...before, text]
}

export function collectEnv(text: string, before: Readonly<Record<string, string>> = {}): Record<string, string> {
  const equals = text.indexOf('=')
  if (equals <= 0) throw new InvalidArgumentError('Write it as KEY=VALUE.')
  return { ...before, [text.slice(0, equals)]: text.slice(equals + 1) }
}
