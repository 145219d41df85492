"""Deliberate breakages of the source, one a row, and the tests of which one at least must turn red.

A row says what its code promises (`keeps`), where it stands (`old`, which occurs in exactly one
place of the service), how it is broken (`new`), and which tests to run. run.py does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

POLICY = "tests/unit/test_gateway_policy.py"
RING = "tests/unit/test_keyring.py"
LIMITS = "tests/unit/test_keyring_limits.py"
MACHINE = "tests/unit/test_keyring_machine.py"
POOL = "tests/unit/test_pool.py"
ADMISSION = "tests/unit/test_admission.py"
RETRY = "tests/unit/test_retry.py"
RELAY = "tests/unit/test_relay.py"
DECODE = "tests/unit/test_openai_decode.py"
CLASSIFY = "tests/unit/test_classify.py"
CONCURRENCY = "tests/unit/test_concurrency.py"
TELEMETRY = "tests/unit/test_telemetry.py"
SECRETS = "tests/service/test_secrets.py"
CANCEL = "tests/service/test_cancel.py"
DEADLINE = "tests/service/test_deadline.py"
BAD = "tests/service/test_bad_upstream.py"
# A few small worlds: what the simulation finds in them is found in no time.
WORLDS = "tests/simulation/test_simulation.py::test_no_invariant_is_broken_in_a_small_world"


@dataclass(frozen=True)
class Mutant:
    """One breakage."""

    keeps: str
    old: str
    new: str
    tests: tuple[str, ...]
    quick: bool = False  # run by every `make test`, not by `make mutants` alone


MUTANTS = (
    # --- the commit rule ---
    Mutant(
        "nothing is retried after the first delta",
        "                if attempt.committed:\n                    raise self._interrupted",
        "                if False:\n                    raise self._interrupted",
        (POLICY,),
        quick=True,
    ),
    Mutant(
        "nothing is retried after the first delta (simulated)",
        "                if attempt.committed:\n                    raise self._interrupted",
        "                if False:\n                    raise self._interrupted",
        (WORLDS,),
    ),
    Mutant(
        "a call counts as committed while its first write is under way",
        "            self.committed = True\n            await self._send(message)",
        "            await self._send(message)\n            self.committed = True",
        (RELAY,),
    ),
    Mutant(
        "a header alone commits nothing",
        "            return\n        if self._relayed is not None and pieces:",
        "            pass\n        if self._relayed is not None and pieces and begun:",
        (RELAY,),
    ),
    Mutant(
        "no other model is asked after the first delta",
        "                if outbox is not None and outbox.committed:\n"
        "                    raise\n"
        "                if error.reason not in passing and not over_tier:",
        "                passing |= {error_reason_pb2.ERROR_REASON_UPSTREAM_STREAM_INTERRUPTED}\n"
        "                if error.reason not in passing and not over_tier:",
        (POLICY,),
    ),
    # --- the lease ---
    Mutant(
        "every lease is given back",
        "                    pool.release(lease)",
        "                    pass",
        (POLICY,),
        quick=True,
    ),
    Mutant(
        "a key that comes at the moment its waiter leaves goes on",
        "                self.release(found)  # it came at the same moment",
        "                pass",
        (POOL,),
    ),
    Mutant(
        "a lease that ends is looked at by those who wait",
        "        self.ring.release(lease)\n        self.look()",
        "        self.ring.release(lease)",
        (POOL,),
    ),
    Mutant(
        "those who wait are looked at when a key opens with time",
        "self._alarm = asyncio.get_running_loop().call_later(delay, self.look)",
        "pass",
        (POOL,),
    ),
    Mutant(
        "those who wait have any key that opens",
        "    return Unavailable(soonest.until, soonest.fault, look_at)",
        "    return Unavailable(soonest.until, soonest.fault, soonest.until)",
        (POOL, MACHINE),
    ),
    Mutant(
        "a lease is released once, however often it is",
        "        if not lease.live:\n            return\n",
        "",
        (RING, MACHINE),
    ),
    # --- cooling, retiring, probing ---
    Mutant(
        "a key that cools is not used",
        "            if block.until > at:\n                at, fault = block.until, block.fault\n",
        "",
        (RING,),
        quick=True,
    ),
    Mutant(
        "a key that cools is not used (simulated)",
        "            if block.until > at:\n                at, fault = block.until, block.fault\n",
        "",
        (WORLDS,),
    ),
    Mutant(
        "one probe at a time",
        "            busy = busy or (0 < block.until <= now and block.probe is not None)\n",
        "",
        (RING, MACHINE),
    ),
    Mutant(
        "one probe at a time (simulated)",
        "            busy = busy or (0 < block.until <= now and block.probe is not None)\n",
        "",
        (WORLDS,),
    ),
    Mutant(
        "a probe that fails leaves the scope to the next one",
        "            if block.probe is lease:\n                block.probe = None",
        "            pass",
        (RING, MACHINE),
    ),
    Mutant(
        "only an answer to its own probe opens a scope",
        "            if block.until == until:\n                block.until, block.strikes",
        "            if True:\n                block.until, block.strikes",
        (RING, MACHINE),
    ),
    Mutant(
        "a late answer never shortens what was asked for",
        "        if until > block.until:\n            block.until, block.fault",
        "        if True:\n            block.until, block.fault",
        (RING, MACHINE),
    ),
    Mutant(
        "no key stays away longer than the cap",
        "            delay = _stated(fault, COOLDOWN_CAP)",
        "            delay = fault.retry_after",
        (RING, MACHINE),
    ),
    Mutant(
        "a delay is never shorter than what was asked for",
        "now + delay * (1 + JITTER * self._random())",
        "now + delay * (1 - JITTER * self._random())",
        (RING, WORLDS),
    ),
    Mutant(
        "a caller's mistake changes no key",
        "    Fault.REFUSED: Verdict(\n        KeyAction.KEEP",
        "    Fault.REFUSED: Verdict(\n        KeyAction.COOL_GROUP",
        (RING, WORLDS),
    ),
    Mutant(
        "a rate limit belongs to the model it was met for",
        '            place: Hashable = ("group", key.quota_group, model)',
        '            place: Hashable = ("group", key.quota_group)',
        (RING, MACHINE),
    ),
    Mutant(
        "a dead account takes all of its keys",
        "        return [key for key in self.keys if key.quota_group == lease.key.quota_group]",
        "        return [lease.key]",
        (RING, MACHINE),
    ),
    Mutant(
        "the breaker opens after ten failures in a row",
        "        elif fault.fault in _BREAKER_FAULTS:",
        "        elif False:",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "requests under way together are one strike",
        "        if self.until <= now:\n            self.strikes += 1",
        "        self.strikes += 1",
        (RING, MACHINE),
    ),
    Mutant(
        "a removed key is leased no more",
        "        self.counts_tokens = any(",
        "        self._keys += before.values()\n        self.counts_tokens = any(",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "a renewed secret has a clean record",
        '            ("key", key.id, key.secret),\n            ("key", key.id, key.secret, model),',
        '            ("key", key.id),\n            ("key", key.id, model),',
        (LIMITS, MACHINE),
    ),
    Mutant(
        "a quota of a day cools for an hour",
        "                delay = COOLDOWN_CAP  # whose midnight",
        "                delay = FIRST_COOLDOWN  # whose midnight",
        (RING, MACHINE),
    ),
    Mutant(
        "a model that no key is known to serve closes none",
        "        if self.served_elsewhere(lease):\n            self._uneven",
        "        if True:\n            self._uneven",
        (RING, MACHINE),
    ),
    # --- which key ---
    Mutant(
        "keys known to serve a model go first where one lacks it",
        "            unknown = uneven and model not in state.serves",
        "            unknown = False",
        (RING, MACHINE),
    ),
    Mutant(
        "a request too large for a group is not offered to it again (simulated)",
        "            plan.avoid |= {lease.key.quota_group}",
        "            pass",
        (WORLDS,),
    ),
    Mutant(
        "a request too large for one account waits for no other",
        "wait=not plan.over_tier,",
        "wait=True,",
        (POLICY,),
    ),
    Mutant(
        "a key found to lack a model leads to one known to serve it, and only then",
        "            fault.should_retry or plan.pool.ring.served_elsewhere(lease)",
        "            True",
        (POLICY,),
    ),
    Mutant(
        "the least busy key serves",
        "            ranked.append((unknown, state.in_flight / state.key.weight, served, place))",
        "            ranked.append((unknown, 0.0, served, place))",
        (RING, MACHINE),
    ),
    Mutant(
        "equal keys take turns",
        "        state.served = start + 1 / key.weight",
        "        state.served = start",
        (RING, MACHINE),
    ),
    Mutant(
        "a prompt stays with its key",
        "            if sticky:\n                rank",
        "            if False:\n                rank",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "requests per minute",
        "        asked = None if state.requests is None else state.requests.spend(now, 1)",
        "        asked = None",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "a minute has sixty seconds",
        "MINUTE = 60.0",
        "MINUTE = 59.0",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "tokens per minute are corrected by what was used",
        "            self._total += cost - spent.units\n",
        "",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "requests of a key at once",
        "        return Unavailable(math.inf, None) if state.in_flight >= limit else None",
        "        return None",
        (LIMITS, MACHINE),
    ),
    Mutant(
        "a 429 lowers how many requests run at once",
        "        self._lower(borne, max(FLOOR, borne * DECREASE), now)",
        "        pass",
        (CONCURRENCY,),
    ),
    Mutant(
        "few requests left lower how many run at once",
        "attempt.lease, progress.remaining_requests, progress.remaining_tokens, self._now()",
        "attempt.lease, None, progress.remaining_tokens, self._now()",
        (POLICY,),
    ),
    # --- the deadline ---
    Mutant(
        "a call ends at its deadline, whatever it does",
        "        timer = asyncio.timeout(seconds)\n        try:\n            async with timer:\n"
        "                self._running.timers",
        "        timer = asyncio.timeout(None)\n        try:\n            async with timer:\n"
        "                self._running.timers",
        (POLICY,),
        quick=True,
    ),
    Mutant(
        "a call ends at its deadline, whatever it does (simulated)",
        "        timer = asyncio.timeout(seconds)\n        try:\n            async with timer:\n"
        "                self._running.timers",
        "        timer = asyncio.timeout(None)\n        try:\n            async with timer:\n"
        "                self._running.timers",
        (WORLDS,),
    ),
    Mutant(
        "no sleep ends after the deadline: that is told at once",
        "        if self._now() + delay >= call.deadline or asked_to_wait:",
        "        if asked_to_wait:",
        (POLICY, WORLDS, "tests/service/test_policy.py"),
    ),
    Mutant(
        "nobody waits for a key that comes too late",
        "(self.fault in _PASSING and self.until < deadline)",
        "(self.fault in _PASSING)",
        (POOL,),
    ),
    Mutant(
        "the last words of a call do not hold it",
        "async with asyncio.timeout(max(_LAST_WORDS, call.deadline - self._now())):",
        "async with asyncio.timeout(None):",
        (POLICY,),
    ),
    Mutant(
        "a caller that does not read is given up",
        "            with self._alarm.until(self._now() + self._write_timeout):",
        "            with self._alarm.until(math.inf):",
        (RELAY,),
    ),
    Mutant(
        "an alarm leaves a cancel of others alone",
        "if task.uncancel() <= self._before and kind",
        "if task.uncancel() >= 0 and kind",
        ("tests/unit/test_timer.py",),
    ),
    Mutant(
        "what has arrived by the time of an alarm was in time",
        "        elif self._patience:",
        "        elif False:",
        ("tests/unit/test_timer.py",),
    ),
    Mutant(
        "a plain piece with a usage goes the long way",
        "    usage: None = None",
        "    usage: dict | None = None",
        ("tests/unit/test_openai_plain.py",),
    ),
    Mutant(
        "half a surrogate pair waits for the other half",
        "if self._header_sent and not self._lossy and not self.done",
        "if self._header_sent and not self.done",
        ("tests/unit/test_openai_plain.py", "tests/corpus/test_plain_pieces.py"),
    ),
    # --- retries ---
    Mutant(
        "retries come from the budget",
        "        if not self._budget.withdraw():\n            raise give_up\n",
        "",
        (WORLDS, "tests/service/test_policy.py"),
    ),
    Mutant(
        "an empty budget gives nothing",
        "        if self.balance < 1:\n            return False\n",
        "",
        (RETRY,),
        quick=True,
    ),
    Mutant(
        "unused retries pile up to a bound",
        "self._earned = min(self._CAP * self._ratio, self._earned + self._ratio)",
        "self._earned = self._earned + self._ratio",
        (RETRY,),
    ),
    Mutant(
        "going back to a model is a retry",
        "            if plan.unpaid and not self._budget.withdraw():\n                continue\n",
        "",
        (POLICY,),
    ),
    Mutant(
        "a call counts once for the budget",
        "            call.counted = True\n",
        "",
        (POLICY,),
    ),
    Mutant(
        "attempts have a maximum",
        ">= self._most:",
        "> self._most:",
        (POLICY, WORLDS),
    ),
    Mutant(
        "some faults are tried once more, and only once",
        "        if action is RequestAction.ONCE_MORE and seen[fault.fault] > 1:\n"
        "            raise give_up\n",
        "",
        (WORLDS, "tests/service/test_error_table.py"),
    ),
    Mutant(
        "x-should-retry: false is obeyed",
        "        if fault.should_retry is False:\n            raise give_up\n",
        "",
        ("tests/service/test_policy.py", "tests/service/test_error_table.py"),
    ),
    Mutant(
        "backoff has full jitter",
        "        return ceiling * self.random()",
        "        return ceiling",
        (RETRY,),
    ),
    Mutant(
        "retry-after-ms is in milliseconds",
        "        return ms / 1000",
        "        return ms",
        (CLASSIFY,),
    ),
    Mutant(
        "retry-after may be a date",
        "            wait = date - (sent if sent is not None else now())",
        "            wait = date",
        (CLASSIFY,),
    ),
    # --- slots ---
    Mutant(
        "a slot comes back",
        "        self._leave()\n\n    async def _enter",
        "        pass\n\n    async def _enter",
        (ADMISSION,),
    ),
    Mutant(
        "a slot that comes at the moment its waiter leaves goes on",
        "                self._leave()  # the slot came at the same moment: hand it on",
        "                pass",
        (ADMISSION,),
    ),
    Mutant(
        "a full queue refuses at once",
        "len(self._waiting) >= self._queue or self._now()",
        "self._now()",
        (ADMISSION,),
    ),
    Mutant(
        "a slow upstream does not take every slot",
        "                plan.pool.bulkhead.slot(call.deadline),\n",
        "",
        (POLICY,),
    ),
    Mutant(
        "a drain refuses what is new",
        "        if self._running.closed or not call.accepted:\n"
        "            self.refuse_if_draining()\n",
        "",
        (WORLDS,),
    ),
    Mutant(
        "a drain refuses nothing that was accepted before",
        "        if self._running.closed or not call.accepted:\n"
        "            self.refuse_if_draining()\n",
        "        self.refuse_if_draining()\n",
        ("tests/service/test_batch_chat.py", "tests/service/test_process.py", WORLDS),
    ),
    Mutant(
        "the end of a drain's grace ends the calls that run (simulated)",
        "            timer.reschedule(asyncio.get_running_loop().time())",
        "            pass",
        (WORLDS,),
    ),
    Mutant(
        "a batch does not go on when the grace of a drain is over",
        "        if self._running.closed or not call.accepted:",
        "        if not call.accepted:",
        (POLICY, WORLDS),
    ),
    Mutant(
        "after a connection that died in the pool comes a fresh one (simulated)",
        "Progress(fresh=plan.seen[Fault.STALE_CONNECTION] > 0)",
        "Progress()",
        (WORLDS,),
    ),
    # --- fallbacks ---
    Mutant(
        "what no key can serve leads to the next model also after a request was too large",
        "        plan.last = fault  # what the caller hears",
        "        # what the caller hears",
        (POLICY,),
    ),
    Mutant(
        "the error is about the model asked for",
        "                if index == 0:\n                    errors[0], told_at",
        "                if True:\n                    errors[0], told_at",
        (POLICY,),
    ),
    Mutant(
        "nobody waits while there is another model to ask",
        "                plan.patient = not names",
        "                plan.patient = True",
        (POLICY,),
    ),
    # --- the truth at the end of a stream ---
    Mutant(
        "OK needs proof of completion",
        "        if not ended and not self.done:",
        "        if False:",
        (DECODE,),
        quick=True,
    ),
    Mutant(
        "every choice must end",
        "        ended = ended and len(self._choices) >= self._asked\n",
        "",
        (DECODE,),
    ),
    Mutant(
        "the last usage counts",
        "            self.usage = usage\n\n    def _choice(",
        "            self.usage = self.usage or usage\n\n    def _choice(",
        (DECODE,),
    ),
    Mutant(
        "an estimate says so",
        "        estimated=True,",
        "        estimated=False,",
        (POLICY,),
    ),
    Mutant(
        "comments are no progress",
        "            if self._begun and (\n                self.pieces or any(",
        "            if self._begun or (\n                self.pieces or any(",
        (DEADLINE, BAD),
    ),
    Mutant(
        "the header of a failed attempt is not delivered",
        "            self._pending = [event]  # any other",
        "            self._pending.append(event)  # any other",
        (RELAY,),
    ),
    Mutant(
        "a cancel closes the provider's connection",
        "                response.close()\n                self.open_answers",
        "                self.open_answers",
        (CANCEL,),
    ),
    Mutant(
        "no redirect is followed: it would carry prompt and key elsewhere",
        "allow_redirects=False",
        "allow_redirects=True",
        (BAD,),
    ),
    # --- secrets ---
    Mutant(
        "what a provider quotes is scrubbed for the caller",
        "                fault.message = scrub(fault.message)\n",
        "",
        (POLICY,),
        quick=True,
    ),
    Mutant(
        "what a provider quotes is scrubbed for the caller (simulated)",
        "                fault.message = scrub(fault.message)\n",
        "",
        (WORLDS,),
    ),
    Mutant(
        "the scrubber finds keys as JSON quotes them",
        '            text = text.replace(form, "***")',
        "            pass",
        (TELEMETRY, "tests/unit/test_errors.py", SECRETS),
    ),
    Mutant(
        "the log is scrubbed",
        "return self._scrub(value) if isinstance(value, str) else value",
        "return value",
        (TELEMETRY, SECRETS),
    ),
    Mutant(
        "a secret does not show itself",
        '        return "Secret(***)"',
        "        return repr(self.__value)",
        (RING, "tests/unit/test_config.py", SECRETS),
    ),
    # --- telemetry ---
    Mutant(
        "names that nobody answers for make no series",
        "        if not answered or len(self._earned) >= self._most",
        "        if len(self._earned) >= self._most",
        ("tests/unit/test_labels.py",),
        quick=True,
    ),
    Mutant(
        "calls that a full queue refuses are counted",
        "            self.dropped += 1\n            raise FullError",
        "            raise FullError",
        ("tests/service/test_metrics.py",),
    ),
    Mutant(
        "each delta but the first of a stream ends a gap",
        "                self._relayed(pieces, None, now - self._delta_at)",
        "                self._relayed(pieces, None, None)",
        ("tests/service/test_metrics.py",),
    ),
    Mutant(
        "upstreams get the trace of their attempt",
        "                progress.headers = attempt.span.headers\n",
        "",
        ("tests/service/test_traceparent.py",),
    ),
    Mutant(
        "a trace that its caller does not record goes on within it",
        '        if len(found["traceparent"]) == 1:',
        '        if len(found["traceparent"]) > 1:',
        ("tests/service/test_traceparent.py",),
    ),
    # --- leaving, and another configuration ---
    Mutant(
        "who drains is alive",
        "        for name in self._ready:\n            await self.set(name, _NOT_SERVING)",
        "        for name in (*self._ready, LIVENESS):\n"
        "            await self.set(name, _NOT_SERVING)",
        ("tests/service/test_health_and_reflection.py",),
    ),
    Mutant(
        "an RPC that is on no list needs a token",
        "        if handler is None or method in OPEN_RPCS:",
        '        if handler is None or not method.startswith("/tokenwire."):',
        ("tests/service/test_callers.py",),
    ),
    Mutant(
        "what cannot change while it runs stays",
        "            if path in RELOADED or was == would:",
        "            if True:",
        ("tests/unit/test_reload.py",),
    ),
    Mutant(
        "a configuration that is being written is not read",
        "        if asked or (settled and look != self._tried):",
        "        if asked or look != self._tried:",
        ("tests/unit/test_reload.py",),
    ),
    Mutant(
        "what an upstream's running calls use is closed after them",
        "            await self._boundary.passed()\n",
        "            pass\n",
        ("tests/service/test_reload.py",),
    ),
    # --- what replicas share: these need a redis-server ---
    Mutant(
        "a caller that leaves while Redis decides holds no slot there",
        "            self._finish(found, lease, 0, 0, 0, 0)\n            raise",
        "            raise",
        ("tests/shared/test_quotas.py",),
    ),
    Mutant(
        "what a dead replica had running counts no more",
        "  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)\n",
        "",
        ("tests/shared/test_quotas.py",),
    ),
    Mutant(
        "no sixty seconds let more through than the limit, over all replicas",
        "  local last = math.floor((now - window) / BUCKET) - 1",
        "  local last = math.floor((now - window) / BUCKET) + 5",
        ("tests/shared/test_quotas.py",),
    ),
    Mutant(
        "a Redis that has forgotten is told everything of the last minute",
        "taken.untold_requests, taken.untold_tokens = taken.requests, taken.tokens",
        "pass",
        ("tests/shared/test_quotas.py",),
    ),
    Mutant(
        "while Redis is away and on_failure is closed, nobody with limits is served",
        "            if not self._quotas.closed:\n                return None\n",
        "            if True:\n                return None\n",
        ("tests/shared/test_replicas.py",),
    ),
    Mutant(
        "a key that one replica retires is left alone by the others",
        "            self.tell(_told(place, key, block,",
        "            (_told(place, key, block,",
        ("tests/shared/test_keys.py",),
    ),
    Mutant(
        "a shorter closure that is told does not undo a longer one",
        "        if closed.until <= block.until:\n            return False",
        "        if False:\n            return False",
        ("tests/shared/test_keys.py",),
    ),
    Mutant(
        "what Redis refuses costs a key nothing",
        "                spent.window.correct(spent, 0)\n",
        "                pass\n",
        ("tests/shared/test_keys.py",),
    ),
)
