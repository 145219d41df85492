package main

import (
	"strings"
	"testing"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

func TestTalk(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.Text("Hel", "lo")).Fail(tokenwiretest.Failure{
		Reason: tokenwire.ReasonContentFiltered, Message: "no", After: []tokenwiretest.Part{tokenwiretest.Text("Wel")},
	}).Reply(tokenwiretest.Text("Bye"))
	var out strings.Builder
	talk(gateway.Client(t), "m", strings.NewReader("Hi\nWhat?\nBye\n"), &out)
	if got := out.String(); !strings.HasPrefix(got, "> Hello\n> Wel [CONTENT_FILTERED: no (request ") || !strings.HasSuffix(got, ")]\n> Bye\n> ") {
		t.Errorf("printed %q", got)
	}
	var said []string
	for _, message := range gateway.Calls()[2].Chat().GetMessages() {
		said = append(said, message.GetContent())
	}
	if got := strings.Join(said, "|"); got != "Hi|Hello|What?|Wel|Bye" {
		t.Errorf("said %q", got)
	}
}
