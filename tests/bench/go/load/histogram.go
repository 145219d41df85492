package main

import (
	"math/bits"
	"time"
)

// Histogram counts durations in buckets that are 3 % wide at most, from 1 ns to 4 hours.
type Histogram struct {
	buckets [44 * perOctave]int64
	count   int64
	max     time.Duration
}

const (
	perOctave    = 32
	octaveDigits = 5 // perOctave is 1 << octaveDigits
)

// Add counts one duration; a negative one, as clocks may give, as 0.
func (h *Histogram) Add(d time.Duration) {
	d = max(d, 0)
	h.buckets[min(bucket(uint64(d)), len(h.buckets)-1)]++
	h.count++
	h.max = max(h.max, d)
}

// Quantile is the duration that a share of all do not exceed, within 3 %; 0 of none.
func (h *Histogram) Quantile(share float64) time.Duration {
	left := int64(share * float64(h.count))
	for i, count := range h.buckets {
		if left -= count; left < 0 {
			return min(lowerBound(i), h.max)
		}
	}
	return h.max
}

// bucket: values below perOctave have one each; then each power of two has perOctave of them.
func bucket(value uint64) int {
	if value < perOctave {
		return int(value)
	}
	shift := bits.Len64(value) - octaveDigits - 1
	return (shift+1)*perOctave + int(value>>shift) - perOctave
}

func lowerBound(bucket int) time.Duration {
	if bucket < perOctave {
		return time.Duration(bucket)
	}
	shift := bucket/perOctave - 1
	return time.Duration((bucket%perOctave + perOctave) << shift)
}

// Summary is a histogram in milliseconds.
type Summary struct {
	Count int64   `json:"count"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p999"`
	Max   float64 `json:"max"`
}

func (h *Histogram) Summary() Summary {
	at := func(share float64) float64 { return milliseconds(h.Quantile(share)) }
	return Summary{h.count, at(.5), at(.9), at(.99), at(.999), milliseconds(h.max)}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
