import { defineConfig } from 'vitest/config'

// The runtimes one after the other: two cores are not enough to measure two forks at once.
export default defineConfig({
  test: {
    include: ['test/matrix/**/*.matrix.ts'],
    fileParallelism: false,
    testTimeout: 300_000,
    hookTimeout: 900_000,
  },
})
