/** A baseline image from end to end: imported, started from without a boot, warmed up, reforked, and exported in its turn. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { exportGeneration, importGeneration } from '../src/archive.js'
import { ask } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

const place = useCleanPlace()

test('a baseline is customised: import, fork, warm up, refork, export', { timeout: 60_000 }, async () => {
  const store = join(place.current.directory, 'store')
  const file = (name: string) => join(place.current.directory, name)
  const baseline = await place.current.start({ name: 'baseline', reuse: true })
  await ask(await baseline.fork(), 'count')
  const { digest } = await exportGeneration({ name: 'baseline', store, file: file('baseline.tar.zst') })
  await baseline.stop()

  await importGeneration({ file: file('baseline.tar.zst'), store, name: 'custom', digest })
  const custom = await place.current.start({ name: 'custom', reuse: { onMismatch: 'error' } })
  // Nothing was booted.
  expect([custom.generation, custom.template]).toEqual([1, undefined])
  const child = await custom.fork()
  for (let i = 1; i <= 3; i++) expect(await ask(child, 'count')).toBe(String(i))
  expect(await custom.refork({ from: child })).toMatchObject({ number: 2, parent: 1 })
  const exported = await exportGeneration({ name: 'custom', store, file: file('custom.tar.zst') })
  expect(exported.number).toBe(2)
  await custom.stop()

  await importGeneration({ file: file('custom.tar.zst'), store, name: 'shipped', digest: exported.digest })
  const shipped = await place.current.start({ name: 'shipped', reuse: { onMismatch: 'error' } })
  const warm = await shipped.fork()
  expect(await ask(warm, 'count')).toBe('4')
  expect(await ask(warm, 'pid')).toBe(String(warm.pid))
})
