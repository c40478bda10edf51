{{- /* Whether an object of the Prometheus operator is rendered, as `true` or nothing: its settings, and its kind. */ -}}
{{- define "qlora-operator.monitored" -}}
{{- $served := .root.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" .kind) -}}
{{- if not .settings.enabled -}}
{{- else if or $served (eq .settings.renderMode "alwaysRender") -}}
true
{{- else if eq .settings.renderMode "failIfMissing" -}}
{{- fail (printf "the cluster has no %s CRD (monitoring.coreos.com/v1): install the Prometheus operator, or set monitoring.%s.renderMode to skipIfMissing" .kind (untitle .kind)) -}}
{{- end -}}
{{- end -}}
