//! TLS and mutual TLS against the fake gateway, with authorities made for the test.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tokenwire::testing::FakeGateway;
use tokenwire::tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};
use tokenwire::{Code, Reason, Tls};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key of a host, as PEM text.
    fn issue(&self, host: &str) -> (String, String) {
        let params = CertificateParams::new([host.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// Who answers at `host`, and whether it wants to know who calls.
struct Case {
    name: &'static str,
    mutual: bool,
    host: &'static str,
    tls: Option<Tls>,
    good: bool,
}

#[tokio::test]
async fn only_whom_both_sides_trust() {
    let (ours, strangers) = (Authority::new("ours"), Authority::new("strangers"));
    let (mine, theirs) = (ours.issue("me"), strangers.issue("them"));
    let trusted = || Tls::authorities(&ours.pem);
    let of_tonic = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ours.pem));
    let case = |name, mutual, host, tls, good| Case { name, mutual, host, tls, good };
    let cases = [
        case("trusted, by name", false, "localhost", Some(trusted()), true),
        case("trusted, by address", false, "127.0.0.1", Some(trusted()), true),
        case("another name", false, "gateway", Some(trusted()), false),
        case("the name told", false, "gateway", Some(trusted().server_name("gateway")), true),
        case(
            "tonic's own config",
            false,
            "localhost",
            Some(of_tonic.domain_name("localhost").into()),
            true,
        ),
        case("a stranger's", false, "localhost", Some(Tls::authorities(&strangers.pem)), false),
        case("the system's", false, "localhost", Some(Tls::system_roots()), false),
        case("plaintext", false, "localhost", None, false),
        case("mutual", true, "localhost", Some(trusted().identity(&mine.0, &mine.1)), true),
        case("mutual without", true, "localhost", Some(trusted()), false),
        case(
            "mutual by a stranger",
            true,
            "localhost",
            Some(trusted().identity(&theirs.0, &theirs.1)),
            false,
        ),
    ];
    for Case { name, mutual, host, tls, good } in cases {
        let (certificate, key) = ours.issue(host);
        let mut config = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
        if mutual {
            config = config.client_ca_root(Certificate::from_pem(&ours.pem));
        }
        let gateway = FakeGateway::builder().token("secret").tls(config).start();
        gateway.reply(["Hello"]);
        let port = gateway.target().rsplit_once(':').unwrap().1.to_owned();
        // Both stand for the gateway; only "127.0.0.1" is an address in a certificate.
        let at = if host == "127.0.0.1" { "127.0.0.1" } else { "localhost" };
        let mut builder = tokenwire::Client::builder(format!("{at}:{port}")).token("secret");
        if let Some(tls) = tls {
            builder = builder.tls(tls);
        }
        let answer = builder.connect_lazy().unwrap().chat("Hi").model("any").send().await;
        if good {
            assert_eq!(answer.unwrap_or_else(|e| panic!("{name}: {e}")).text(), "Hello", "{name}");
        } else {
            let error = answer.expect_err(name);
            assert_eq!(error.code(), Code::Unavailable, "{name}: {error}");
            assert_eq!(error.reason(), &Reason::Unspecified, "{name}: {error}");
        }
        assert_eq!(
            gateway.calls().len(),
            usize::from(good),
            "{name}: who is not trusted is told nothing"
        );
    }
}

#[test]
fn what_is_no_certificate_is_told_before_any_call() {
    let ours = Authority::new("ours");
    let (certificate, key) = ours.issue("me");
    let trusted = || Tls::authorities(&ours.pem);
    for (name, tls) in [
        ("no authority", Tls::authorities("")),
        ("no PEM", Tls::authorities("ca.pem")),
        ("no certificate", trusted().identity("", &key)),
        ("no key", trusted().identity(&certificate, "")),
        ("another's key", trusted().identity(&certificate, ours.issue("you").1)),
    ] {
        let refused = tokenwire::Client::builder("gateway:443").tls(tls).connect_lazy();
        let error = refused.expect_err(name);
        assert_eq!(error.code(), Code::InvalidArgument, "{name}: {error}");
        assert_eq!(error.field_violations()[0].field, "tls", "{name}: {error}");
    }
}
