//! How a client reaches its gateway: address, replicas, TLS, token.

use std::error::Error as StdError;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tonic::codegen::http::{Uri, uri::Authority};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use crate::errors::Error;

pub(crate) const DEFAULT_TARGET: &str = "localhost:50051";

/// A model may think for minutes in silence. These pings notice a dead connection, and keep
/// proxies from dropping a live one; the gateway allows one per 10 s.
const PING_EVERY: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 30_000 });
const PING_TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a replica that could not be connected to is passed over, if there is another.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);

pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;
pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
pub(crate) type Configure = Arc<dyn Fn(Endpoint) -> Endpoint + Send + Sync>;

/// Whom to trust, and who the client is.
///
/// A [`ClientTlsConfig`] of tonic becomes one, for what has no method here.
#[derive(Clone, Debug)]
pub struct Tls {
    config: ClientTlsConfig,
    /// Whether the name that the certificate must have is settled; else it is the target's.
    named: bool,
    refused: Option<&'static str>,
}

impl Tls {
    fn new(config: ClientTlsConfig) -> Self {
        Self { config, named: false, refused: None }
    }

    /// Trusts the authorities of the operating system.
    pub fn system_roots() -> Self {
        Self::new(ClientTlsConfig::new().with_native_roots())
    }

    /// Trusts only these authorities: certificates as PEM text.
    pub fn authorities(pem: impl AsRef<[u8]>) -> Self {
        // A text without any would trust nobody, and say so only when it meets the gateway.
        let has_some =
            String::from_utf8_lossy(pem.as_ref()).contains("-----BEGIN CERTIFICATE-----");
        let refused = (!has_some).then_some("expected the authorities' certificates as PEM text");
        let tls = Self::new(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)));
        Self { refused, ..tls }
    }

    /// The client's own certificate (chain) and key as PEM text, for mutual TLS.
    #[must_use]
    pub fn identity(self, certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        Self { config: self.config.identity(Identity::from_pem(certificate, key)), ..self }
    }

    /// The name the gateway's certificate must have; unless given, that of the target.
    #[must_use]
    pub fn server_name(self, name: impl Into<String>) -> Self {
        Self { config: self.config.domain_name(name), named: true, ..self }
    }

    /// For a target of this host.
    fn of(&self, host: &str) -> ClientTlsConfig {
        let config = self.config.clone();
        // Replicas are reached by address: without a name tonic would look for that one.
        if self.named { config } else { config.domain_name(host.trim_matches(['[', ']'])) }
    }
}

/// Taken as it is. Give it a `domain_name`: replicas are reached by address, which is what tonic
/// looks for in their certificates otherwise.
impl From<ClientTlsConfig> for Tls {
    fn from(config: ClientTlsConfig) -> Self {
        Self { named: true, ..Self::new(config) }
    }
}

/// A bearer token, or what returns the current one.
#[derive(Clone)]
pub(crate) enum Token {
    None,
    Fixed(MetadataValue<Ascii>),
    Supplier(Arc<dyn Fn() -> BoxFuture<Result<String, BoxError>> + Send + Sync>),
}

impl Token {
    pub(crate) fn fixed(token: &str) -> Result<Self, Error> {
        if token.is_empty() { Ok(Self::None) } else { bearer(token).map(Self::Fixed) }
    }

    /// The metadata that proves who calls.
    pub(crate) async fn authorization(&self) -> Result<Option<MetadataValue<Ascii>>, Error> {
        match self {
            Self::None => Ok(None),
            Self::Fixed(value) => Ok(Some(value.clone())),
            Self::Supplier(ask) => match ask().await {
                Ok(token) if token.is_empty() => Ok(None),
                Ok(token) => bearer(&token).map(Some),
                Err(error) => {
                    let message = format!("the token supplier failed: {error}");
                    Err(Error::new(Code::Unauthenticated, message))
                }
            },
        }
    }
}

fn bearer(token: &str) -> Result<MetadataValue<Ascii>, Error> {
    // Never the token itself: this text ends up in logs.
    let refused =
        || Error::invalid("token", "holds a space, a line end or a character outside ASCII");
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(refused());
    }
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {token}").parse().map_err(|_| refused())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Where the gateway is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Host(Authority),
    Unix(String),
}

impl Target {
    fn parse(text: &str) -> Result<Self, Error> {
        let refused = |why: String| Error::invalid("target", why);
        let expected =
            || refused(format!("expected HOST:PORT such as {DEFAULT_TARGET:?}, got {text:?}"));
        if text.starts_with("unix:") {
            return Ok(Self::Unix(text.to_owned()));
        }
        let address = text.strip_prefix("dns:///").unwrap_or(text);
        if address.contains("://") {
            return Err(refused(format!("expected HOST:PORT, without a scheme, got {text:?}")));
        }
        let authority: Authority = address.parse().map_err(|_| expected())?;
        let plain = authority.port_u16().is_some() && !authority.as_str().contains('@');
        if plain && !authority.host().is_empty() {
            Ok(Self::Host(authority))
        } else {
            Err(expected())
        }
    }
}

/// The way to the gateway: one channel for each replica its name stands for.
///
/// tonic balances over what it is told, by load, and knows no DNS; this knows DNS, and takes
/// turns.
pub(crate) struct Gateway {
    name: String,
    way: Way,
}

enum Way {
    /// A channel of the caller's own.
    Given(Channel),
    Found {
        settings: Box<Settings>,
        replicas: Arc<Mutex<Replicas>>,
        first: tokio::sync::Mutex<()>,
    },
}

#[derive(Clone)]
struct Settings {
    target: Target,
    tls: Option<Tls>,
    configure: Configure,
    names: Names,
}

pub(crate) type Lookup =
    dyn Fn(String, u16) -> BoxFuture<std::io::Result<Vec<SocketAddr>>> + Send + Sync;

/// What names stand for.
#[derive(Clone)]
pub(crate) struct Names {
    pub(crate) lookup: Arc<Lookup>,
    /// How old an answer may be while calls are made.
    pub(crate) keep: Duration,
    /// And while a replica cannot be reached.
    pub(crate) keep_in_need: Duration,
}

impl Names {
    /// As the operating system knows them.
    fn system() -> Self {
        let lookup = |host: String, port| -> BoxFuture<_> {
            Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
        };
        let (keep, keep_in_need) = (Duration::from_secs(30), Duration::from_secs(1));
        Self { lookup: Arc::new(lookup), keep, keep_in_need }
    }
}

#[derive(Default)]
struct Replicas {
    all: Vec<Replica>,
    turn: usize,
    resolved: Option<Instant>,
    resolving: bool,
}

struct Replica {
    address: String,
    channel: Channel,
    /// Outages in a row.
    failures: u32,
    rests_until: Option<Instant>,
    /// It has been connected to, or has answered, and has not failed since.
    ready: bool,
    connecting: bool,
}

impl Replica {
    fn failed(&mut self, now: Instant) {
        (self.ready, self.connecting) = (false, false);
        // Of calls that fail together the first one tells of the outage, the others of the same.
        if self.rests_until.is_some_and(|until| until > now) {
            return;
        }
        let rest = REST.saturating_mul(1 << self.failures.min(10)).min(LONGEST_REST);
        self.rests_until = Some(now + rest);
        self.failures += 1;
    }

    fn is_back(&mut self) {
        (self.ready, self.connecting) = (true, false);
        (self.failures, self.rests_until) = (0, None);
    }

    fn is_awake(&self, now: Instant) -> bool {
        self.rests_until.is_none_or(|until| until <= now)
    }
}

/// A replica to try.
pub(crate) struct Picked {
    pub(crate) channel: Channel,
    address: String,
}

impl Gateway {
    pub(crate) fn given(name: String, channel: Channel) -> Self {
        Self { name, way: Way::Given(channel) }
    }

    pub(crate) fn at(target: &str, tls: Option<Tls>, configure: Configure) -> Result<Self, Error> {
        Self::found_by(target, tls, configure, Names::system())
    }

    pub(crate) fn found_by(
        target: &str,
        tls: Option<Tls>,
        configure: Configure,
        names: Names,
    ) -> Result<Self, Error> {
        let settings = Settings { target: Target::parse(target)?, tls, configure, names };
        // What is wrong with certificates is told now, not by the first call.
        settings.endpoint("127.0.0.1:1")?;
        let (settings, first) = (Box::new(settings), tokio::sync::Mutex::default());
        let way = Way::Found { settings, replicas: Arc::default(), first };
        Ok(Self { name: target.to_owned(), way })
    }

    #[cfg(all(test, feature = "testing"))]
    pub(crate) fn of_replicas(addresses: Vec<String>) -> Result<Self, Error> {
        let gateway = Self::at("gateway:1", None, Arc::new(|endpoint| endpoint))?;
        if let Way::Found { settings, replicas, .. } = &gateway.way {
            locked(replicas).become_these(settings, addresses)?;
        }
        Ok(gateway)
    }

    /// Connects to some replica.
    pub(crate) async fn connect(&self) -> Result<(), Error> {
        let Way::Found { settings, replicas, .. } = &self.way else { return Ok(()) };
        self.resolved().await?;
        let addresses: Vec<_> = locked(replicas).all.iter().map(|r| r.address.clone()).collect();
        let mut last = None;
        for address in addresses {
            match settings.endpoint(&address)?.connect().await {
                Ok(channel) => {
                    let mut replicas = locked(replicas);
                    if let Some(replica) = replicas.all.iter_mut().find(|r| r.address == address) {
                        replica.channel = channel;
                        replica.is_back();
                    }
                    return Ok(());
                }
                Err(error) => {
                    self.failed(&address);
                    last = Some(Error::from_status(&Status::from_error(Box::new(error)), ""));
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::new(Code::Unavailable, "no address")))
    }

    /// The replica whose turn it is, passing over those in `tried`; `None` when all were.
    pub(crate) async fn pick(&self, tried: &[Picked]) -> Result<Option<Picked>, Error> {
        let (settings, replicas) = match &self.way {
            Way::Given(channel) => {
                let picked = Picked { channel: channel.clone(), address: String::new() };
                return Ok(tried.is_empty().then_some(picked));
            }
            Way::Found { settings, replicas, .. } => (settings, replicas),
        };
        self.resolved().await?;
        let mut state = locked(replicas);
        let now = Instant::now();
        refresh(settings, replicas, &mut state);
        let picked = state.pick(tried, now);
        let others = |replica: &&mut Replica| {
            picked.as_ref().is_none_or(|picked| picked.address != replica.address)
                && replica.is_awake(now)
        };
        for replica in state.all.iter_mut().filter(others) {
            connect_behind(settings, replicas, replica);
        }
        Ok(picked)
    }

    /// Waits for the first addresses.
    async fn resolved(&self) -> Result<(), Error> {
        let Way::Found { settings, replicas, first } = &self.way else { return Ok(()) };
        let _one_at_a_time = first.lock().await;
        if !locked(replicas).all.is_empty() {
            return Ok(());
        }
        let found = settings.resolve().await?;
        locked(replicas).become_these(settings, found)
    }

    /// Notes that a replica could not be connected to.
    pub(crate) fn cannot_connect(&self, picked: &Picked) {
        self.failed(&picked.address);
    }

    fn failed(&self, address: &str) {
        let Way::Found { replicas, .. } = &self.way else { return };
        let mut state = locked(replicas);
        if let Some(replica) = state.all.iter_mut().find(|r| r.address == address) {
            replica.failed(Instant::now());
        }
    }

    /// Notes that a replica answered.
    pub(crate) fn answered(&self, picked: &Picked) {
        let Way::Found { replicas, .. } = &self.way else { return };
        let mut state = locked(replicas);
        if let Some(replica) = state.all.iter_mut().find(|r| r.address == picked.address) {
            replica.is_back();
        }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

fn locked(replicas: &Mutex<Replicas>) -> MutexGuard<'_, Replicas> {
    replicas.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks DNS again, behind the calls' back, when what it said is old.
fn refresh(settings: &Settings, replicas: &Arc<Mutex<Replicas>>, state: &mut Replicas) {
    let age = state.resolved.map_or(Duration::MAX, |at| at.elapsed());
    let in_need = state.all.iter().any(|replica| replica.rests_until.is_some());
    let Names { keep, keep_in_need, .. } = settings.names;
    if state.resolving || age < (if in_need { keep_in_need } else { keep }) {
        return;
    }
    state.resolving = true;
    let (settings, replicas) = (settings.clone(), Arc::downgrade(replicas));
    tokio::spawn(async move {
        let found = settings.resolve().await;
        let Some(replicas) = replicas.upgrade() else { return };
        let mut state = locked(&replicas);
        state.resolving = false;
        state.resolved = Some(Instant::now());
        // What was known stays where DNS fails: it may serve still.
        if let Ok(found) = found {
            let _ = state.become_these(&settings, found);
        }
    });
}

/// Connects to a replica that is not ready, behind the calls' back: those go to others meanwhile.
fn connect_behind(settings: &Settings, replicas: &Arc<Mutex<Replicas>>, replica: &mut Replica) {
    if replica.ready || replica.connecting {
        return;
    }
    let Ok(endpoint) = settings.endpoint(&replica.address) else { return };
    replica.connecting = true;
    let (address, replicas) = (replica.address.clone(), Arc::downgrade(replicas));
    tokio::spawn(async move {
        let connected = endpoint.connect().await;
        let Some(replicas) = replicas.upgrade() else { return };
        let mut state = locked(&replicas);
        let Some(replica) = state.all.iter_mut().find(|r| r.address == address) else { return };
        match connected {
            // A call may have been quicker: its connection stays.
            Ok(_) if replica.ready => replica.connecting = false,
            Ok(channel) => {
                replica.channel = channel;
                replica.is_back();
            }
            Err(_) => replica.failed(Instant::now()),
        }
    });
}

impl Replicas {
    /// The next one that is ready; without any the next that does not rest; else the one that
    /// rests the shortest.
    fn pick(&mut self, tried: &[Picked], now: Instant) -> Option<Picked> {
        let count = self.all.len();
        let free = |replica: &Replica| tried.iter().all(|picked| picked.address != replica.address);
        let turns = (0..count).map(|i| (self.turn + i) % count);
        let at = turns
            .clone()
            .find(|&at| free(&self.all[at]) && self.all[at].ready)
            .or_else(|| turns.clone().find(|&at| free(&self.all[at]) && self.all[at].is_awake(now)))
            // All rest: one of them may be back.
            .or_else(|| {
                turns.filter(|&at| free(&self.all[at])).min_by_key(|&at| self.all[at].rests_until)
            })?;
        self.turn = at + 1;
        let replica = &self.all[at];
        Some(Picked { channel: replica.channel.clone(), address: replica.address.clone() })
    }

    /// Connections to addresses that are still there are kept; calls on the others go on.
    fn become_these(&mut self, settings: &Settings, found: Vec<String>) -> Result<(), Error> {
        let mut before = std::mem::take(&mut self.all);
        for address in found {
            if self.all.iter().any(|replica| replica.address == address) {
                continue;
            }
            let known = before.iter().position(|replica| replica.address == address);
            let replica = if let Some(at) = known {
                before.swap_remove(at)
            } else {
                let channel = settings.endpoint(&address)?.connect_lazy();
                Replica {
                    address,
                    channel,
                    failures: 0,
                    rests_until: None,
                    ready: false,
                    connecting: false,
                }
            };
            self.all.push(replica);
        }
        self.resolved = Some(Instant::now());
        Ok(())
    }
}

impl Settings {
    /// The addresses, at least one.
    async fn resolve(&self) -> Result<Vec<String>, Error> {
        let authority = match &self.target {
            Target::Unix(path) => return Ok(vec![path.clone()]),
            Target::Host(authority) => authority,
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or_default();
        let unresolved =
            |why: String| Error::new(Code::Unavailable, format!("cannot resolve {host:?}: {why}"));
        let found = (self.names.lookup)(host.to_owned(), port).await;
        let found = found.map_err(|error| unresolved(error.to_string()))?;
        let addresses: Vec<_> = found.iter().map(ToString::to_string).collect();
        if addresses.is_empty() { Err(unresolved("no address".to_owned())) } else { Ok(addresses) }
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, Error> {
        let broken = |error: tonic::transport::Error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            Error::invalid("tls", cause)
        };
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = match &self.target {
            Target::Unix(path) => Endpoint::from_shared(path.clone()),
            Target::Host(_) => Endpoint::from_shared(format!("{scheme}://{address}")),
        }
        .map_err(|_| Error::invalid("target", format!("cannot be connected to: {address:?}")))?;
        if let Target::Host(authority) = &self.target {
            let origin: Uri = format!("{scheme}://{authority}")
                .parse()
                .map_err(|_| Error::invalid("target", format!("no authority: {authority:?}")))?;
            // Replicas are reached by address, but called by the name they have in common.
            endpoint = endpoint.origin(origin);
        }
        endpoint = endpoint
            .user_agent(concat!("tokenwire-rust/", env!("CARGO_PKG_VERSION")))
            .map_err(broken)?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true);
        if let Some(tls) = &self.tls {
            if let Some(refused) = tls.refused {
                return Err(Error::invalid("tls", refused));
            }
            let config = match &self.target {
                Target::Host(authority) => tls.of(authority.host()),
                Target::Unix(_) => tls.config.clone(),
            };
            endpoint = endpoint.tls_config(config).map_err(broken)?;
        }
        Ok((self.configure)(endpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        for good in [
            "localhost:50051",
            "dns:///gateway.internal:443",
            "[::1]:50051",
            "10.0.0.1:1",
            "unix:/run/t.sock",
        ] {
            Target::parse(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "",
            "localhost",
            "http://localhost:50051",
            "user@localhost:1",
            "localhost:no",
            ":1",
            "a b:1",
        ] {
            let error = Target::parse(bad).expect_err(bad);
            assert_eq!(error.field_violations()[0].field, "target", "{bad}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        for bad in ["se cret", "secret\n", "sécret"] {
            let error = Token::fixed(bad).err().expect(bad);
            assert!(!format!("{error} {error:?}").contains("cret"), "{error}");
        }
        let Ok(Token::Fixed(value)) = Token::fixed("secret") else {
            panic!("a good token is refused")
        };
        assert!(!format!("{value:?}").contains("secret"));
    }

    #[tokio::test]
    async fn replicas_take_turns_and_those_that_fail_are_passed_over() {
        let gateway = Gateway::at("gateway:1", None, Arc::new(|endpoint| endpoint)).unwrap();
        let Way::Found { settings, replicas, .. } = &gateway.way else { unreachable!() };
        let addresses = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"];
        locked(replicas).become_these(settings, addresses.map(str::to_owned).to_vec()).unwrap();
        let now = Instant::now();
        let pick =
            |tried: &[Picked]| locked(replicas).pick(tried, now).map(|picked| picked.address);
        let turns: Vec<_> = (0..4).filter_map(|_| pick(&[])).collect();
        assert_eq!(turns, [addresses[0], addresses[1], addresses[2], addresses[0]]);
        gateway.failed(addresses[1]);
        let turns: Vec<_> = (0..3).filter_map(|_| pick(&[])).collect();
        assert_eq!(turns, [addresses[2], addresses[0], addresses[2]]);
        gateway.failed(addresses[0]);
        gateway.failed(addresses[2]);
        let mut tried = Vec::new();
        while let Some(picked) = locked(replicas).pick(&tried, now) {
            tried.push(picked);
        }
        // The one that has rested longest comes first, and each once.
        assert_eq!(tried[0].address, addresses[1]);
        assert_eq!(tried.len(), 3);
        gateway.answered(&tried[0]);
        assert_eq!(pick(&[]).as_deref(), Some(addresses[1]));
        // DNS knows others now: what is known of one that stays is kept.
        locked(replicas)
            .become_these(settings, vec![addresses[0].to_owned(), "10.0.0.4:1".to_owned()])
            .unwrap();
        let failures: Vec<_> =
            locked(replicas).all.iter().map(|replica| replica.failures).collect();
        assert_eq!(failures, [1, 0]);
        // One that is named twice, as names in several files are, has one turn.
        let twice = vec!["10.0.0.5:1".to_owned(), "10.0.0.5:1".to_owned()];
        locked(replicas).become_these(settings, twice).unwrap();
        assert_eq!(locked(replicas).all.len(), 1);
    }

    /// The types of the frames that a client sends, over a connection that stays idle.
    async fn frames(listener: tokio::net::TcpListener, until: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        const PING: u8 = 6;
        let (socket, _) = listener.accept().await.unwrap();
        let (mut read, mut types) = (Vec::new(), Vec::new());
        let send = async |frame: &[u8]| {
            socket.writable().await.unwrap();
            assert_eq!(socket.try_write(frame).unwrap(), frame.len());
        };
        send(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await; // SETTINGS
        let mut at = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
        while !until(&types) {
            socket.readable().await.unwrap();
            match socket.try_read_buf(&mut read) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
            while let Some(&[a, b, c, kind]) = read.get(at..at + 4) {
                let end = at + 9 + u32::from_be_bytes([0, a, b, c]) as usize;
                let Some(frame) = read.get(at..end) else { break };
                types.push(kind);
                if kind == PING {
                    send(&[&[0, 0, 8, PING, 1, 0, 0, 0, 0], &frame[9..]].concat()).await;
                }
                at = end;
            }
        }
        types
    }

    #[tokio::test]
    async fn an_idle_connection_is_kept_alive_by_pings() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let gateway = Gateway::at(&target, None, Arc::new(|endpoint| endpoint)).unwrap();
        let pings = |types: &[u8]| types.split(|kind| *kind == 6).count() - 1;
        let server = tokio::spawn(frames(listener, move |types| pings(types) == 3));
        gateway.connect().await.unwrap();
        let sent = tokio::time::timeout(Duration::from_secs(20), server).await;
        assert_eq!(pings(&sent.expect("pings").unwrap()), 3);
    }

    fn replicas(addresses: &[&str]) -> Replicas {
        let settings = Settings {
            target: Target::parse("gateway:1").unwrap(),
            tls: None,
            configure: Arc::new(|endpoint| endpoint),
            names: Names::system(),
        };
        let mut replicas = Replicas::default();
        let addresses = addresses.iter().map(ToString::to_string).collect();
        replicas.become_these(&settings, addresses).unwrap();
        replicas
    }

    #[tokio::test]
    async fn an_outage_is_counted_once_however_many_calls_meet_it() {
        let mut replica = replicas(&["127.0.0.1:1"]).all.remove(0);
        let now = Instant::now();
        (0..100).for_each(|_| replica.failed(now));
        assert_eq!((replica.failures, replica.rests_until), (1, Some(now + REST)));
        replica.failed(now + REST);
        assert_eq!(replica.rests_until, Some(now + REST + 2 * REST));
        replica.is_back();
        replica.failed(now);
        assert_eq!(replica.rests_until, Some(now + REST));
    }

    #[tokio::test]
    async fn calls_take_turns_among_ready_replicas_and_meet_others_only_without_one() {
        let now = Instant::now();
        let mut replicas = replicas(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]);
        let next = |replicas: &mut Replicas| replicas.pick(&[], now).unwrap().address;
        assert_eq!(next(&mut replicas), "127.0.0.1:1"); // which is silent, as of now
        replicas.all[1].is_back();
        replicas.all[2].is_back();
        let met: Vec<_> = (0..4).map(|_| next(&mut replicas)).collect();
        assert_eq!(met, ["127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:2", "127.0.0.1:3"]);
        replicas.all[1].failed(now);
        replicas.all[2].failed(now);
        assert_eq!(next(&mut replicas), "127.0.0.1:1");
        replicas.all[0].failed(now);
        assert!(replicas.pick(&[], now).is_some(), "one of those that rest may be back");
    }
}
