package answer

import (
	"testing"
	"time"
)

func TestAModelIsAPlan(t *testing.T) {
	plan, err := Parse("openai/bench-n256-r0.5-d30-t1-e30")
	if err != nil {
		t.Fatal(err)
	}
	want := Plan{Chunks: 256, Rate: 0.5, Delay: 30 * time.Millisecond, Tools: true, Limited: 30}
	if plan != want {
		t.Errorf("%+v, not %+v", plan, want)
	}
	for _, wrong := range []string{"bench-x1", "bench-n", "bench-", "bench-nx", "bench-n-5"} {
		if plan, err := Parse(wrong); err == nil {
			t.Errorf("%q is a plan: %+v", wrong, plan)
		}
	}
}

func TestThirtyPercentOfTenKeysAreThree(t *testing.T) {
	limited := 0
	for digit := '0'; digit <= '9'; digit++ {
		if (Plan{Limited: 30}).KeyIsLimited("sk-bench-" + string(digit)) {
			limited++
		}
	}
	if limited != 3 {
		t.Errorf("%d of ten keys", limited)
	}
	if (Plan{}).KeyIsLimited("sk-bench-0") || (Plan{Limited: 30}).KeyIsLimited("sk-other") {
		t.Error("a key that is not")
	}
}

func TestAStampIsReadBack(t *testing.T) {
	at := time.Unix(1764000000, 123456789)
	token := string(Stamp(nil, at))
	if len(token) != StampLength {
		t.Fatalf("%q", token)
	}
	if back, err := Stamped(token); err != nil || !back.Equal(at) {
		t.Errorf("%v, %v", back, err)
	}
	for _, wrong := range []string{"", " T", "xx1764000000123456789", " T176400000012345678x"} {
		if _, err := Stamped(wrong); err == nil {
			t.Errorf("%q is a stamp", wrong)
		}
	}
}

func TestTextEndsWhereItsTokensEnd(t *testing.T) {
	text, ends := Plan{Chunks: 40}.Text()
	if ends[39] != len(text) || text[ends[8]:ends[9]] != "été" {
		t.Errorf("%q, %v", text, ends)
	}
}
